"""From a slide to a score map on disk: shared contexts, smooth blending, bounded memory, resumable."""

from darefine_qupath.prediction.checks import StainStatistics, stain_statistics
from darefine_qupath.prediction.cluster import SlideResult, SlideTask, predict_many
from darefine_qupath.prediction.options import PredictionProgress, PredictOptions
from darefine_qupath.prediction.scoremap import ScoreMap, SlideWarning, read_score_map
from darefine_qupath.prediction.slide import predict_slide

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
