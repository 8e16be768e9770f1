"""Name a project, its settings and some of its images: what the requests of several verbs begin with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from darefine_qupath.pipeline.settings import Settings, read_settings

__all__ = ["ProjectRequest"]


@dataclass(frozen=True, kw_only=True)
class ProjectRequest:
    """Which images of which project.

    Attributes
    ----------
    project : Path
        Project file or folder.
    settings : Path or None
        Settings file; the project's ``darefine.toml`` by default.
    images : tuple of str
        Names or entry ids; all images that can take part by default.
    mpp : float or None
        Micrometres per pixel of every slide, over what project and files say.
    """

    project: Path
    settings: Path | None = None
    images: tuple[str, ...] = ()
    mpp: float | None = None

    def read_settings(self) -> Settings:
        """Read the settings of the project."""
        return read_settings(self.project if self.project.is_dir() else self.project.parent, self.settings)

    @property
    def given_mpp(self) -> float | None:
        """Micrometres per pixel by the user: of this request, else of the settings."""
        return self.read_settings().mpp if self.mpp is None else self.mpp
