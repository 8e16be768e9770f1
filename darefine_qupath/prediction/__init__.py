"""Predict slides into score maps on disk: shared contexts, smooth blending, bounded memory, resumable."""

from darefine_qupath.prediction.many_slides import predict_many
from darefine_qupath.prediction.options import PredictionProgress, PredictOptions
from darefine_qupath.prediction.scoremap import ScoreMap, read_score_map
from darefine_qupath.prediction.slide import predict_slide
from darefine_qupath.prediction.slide_warnings import SlideWarning
from darefine_qupath.prediction.stain import StainStatistics, stain_statistics
from darefine_qupath.prediction.tasks import SlideResult, SlideTask

__all__ = [
    "PredictOptions",
    "PredictionProgress",
    "ScoreMap",
    "SlideResult",
    "SlideTask",
    "SlideWarning",
    "StainStatistics",
    "predict_many",
    "predict_slide",
    "read_score_map",
    "stain_statistics",
]
