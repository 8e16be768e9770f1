"""The ``darefine`` command."""

from darefine_qupath.cli.group import main

__all__ = ["main"]
