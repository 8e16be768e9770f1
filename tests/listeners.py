"""Listeners that keep what they hear."""

from __future__ import annotations

from darefine_qupath.pipeline.listener import Listener
from darefine_qupath.prediction import PredictionProgress

__all__ = ["KeepingListener"]


class KeepingListener(Listener):
    """Keeps notices and how far slides were."""

    def __init__(self) -> None:
        self.notices: list[str] = []
        self.slides: list[PredictionProgress] = []

    def on_notice(self, sentence: str) -> None:
        """Keep a sentence."""
        self.notices.append(sentence)

    def on_slide(self, progress: PredictionProgress) -> None:
        """Keep how far a slide is."""
        self.slides.append(progress)
