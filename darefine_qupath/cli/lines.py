"""Lines for the person at the terminal.

What is said holds names out of files: of images, classes, annotations, models. Here, and nowhere else, they lose what a
terminal would obey and what hides how they are spelled.
"""

from __future__ import annotations

import logging
import re

import click

__all__ = ["UNSEEN", "LogFormatter", "note", "say", "visible"]

UNSEEN = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")
"""Control characters of both ranges, marks and overrides of the writing direction, line ends, half characters."""

_LONGEST = 4000


def visible(text: str) -> str:
    r"""Write `UNSEEN` characters as escapes: ``\x1b``, ``\u202e``."""
    return UNSEEN.sub(lambda found: ascii(found[0])[1:-1], text)


def say(*lines: object) -> None:
    """Print lines of the result; a line stays one, whatever names are in it."""
    for line in lines:
        click.echo(visible(str(line)))


def note(*lines: object) -> None:
    """Say something to the person, apart from the result; what is longer than any of our sentences is cut."""
    for line in lines:
        text = visible(str(line))
        click.echo(text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ...", err=True)


class LogFormatter(logging.Formatter):
    """Messages of the log as lines; tracebacks as they are."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """Format a record without its traceback."""
        return visible(super().formatMessage(record))
