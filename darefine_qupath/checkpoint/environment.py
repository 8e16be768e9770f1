"""Record the versions of the software that trains a model."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import numpy as np
import torch

from darefine_qupath import __version__

__all__ = ["environment"]


def environment() -> dict[str, str | None]:
    """Versions of what trains, and the commit of darefine's source where it is a git checkout."""
    return {
        "darefine": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "git": _git_commit(),
    }


def _git_commit() -> str | None:
    """Commit of the source tree, with ``+`` after it where files were changed; None outside a checkout."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    return commit + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
