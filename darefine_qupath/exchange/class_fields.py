"""Choose the field of an object that holds its class, and say what the other fields hold.

Programs put it into the layer, the text, a property of any name. The first field of a format's list that has a value
gives the class, unless the user names others; what was taken from where, and what was left, is said in a line each.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["ClassChoice", "FieldTally"]

_MAX_FIELDS = 8
_MAX_VALUE = 30
_OPTION = "--class-from"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassChoice:
    """What the fields of one object say about its class.

    Attributes
    ----------
    name : str or None
        The class; None where no field gives one.
    source : str or None
        The field that gave it.
    others : mapping of str to str
        What other fields hold.
    """

    name: str | None = None
    source: str | None = None
    others: Mapping[str, str] = field(default_factory=dict)


class FieldTally:
    """Counts what gave the classes of a file.

    Parameters
    ----------
    asked : sequence of str
        Fields that the user named; empty = the format's own order.
    """

    def __init__(self, asked: Sequence[str] = ()) -> None:
        self.asked = tuple(asked)
        self._total = 0
        self._sources: Counter[str] = Counter()
        self._others: Counter[str] = Counter()
        self._left: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def add(self, choice: ClassChoice) -> None:
        """Count an object that is imported."""
        self._total += 1
        if choice.source is not None:
            self._sources[choice.source] += 1
        counter = self._others if choice.name is not None else self._left
        for name, value in choice.others.items():
            counter[name] += 1
            self._examples.setdefault(name, value)

    @property
    def is_fruitless(self) -> bool:
        """Whether there are objects, and none has a field that the user named."""
        return bool(self.asked) and self._total > 0 and not self._sources

    def known(self) -> str:
        """Fields that have values, with one each."""
        return self._listed(self._left + self._others) or "none"

    def notes(self) -> tuple[str, ...]:
        """Say in a line each what gave the classes, what else there is, how many objects have no class."""
        lines = []
        if self._sources:
            given = " and ".join(f"{name} ({count})" for name, count in self._sources.items())
            lines.append(f"class from {given}, of {self._total} objects")
        if self._others and not self.asked:
            lines.append(f"other words stand in {self._listed(self._others)}; {_OPTION} FIELD takes them as the class")
        missing = self._total - self._sources.total()
        if missing:
            fields = self._listed(self._left)
            hint = f"; the file has {fields}: {_OPTION} FIELD says which is the class" if fields else ""
            lines.append(f"{missing} of {self._total} without class{hint}")
        return tuple(lines)

    def _listed(self, counts: Counter[str]) -> str:
        names = [name for name, _ in counts.most_common(_MAX_FIELDS)]
        shown = [f"{name} (e.g. {_short(self._examples[name])})" for name in names]
        more = len(counts) - len(names)
        return ", ".join(shown) + (f" and {more} more fields" if more else "")


def _short(value: str) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_VALUE else f'{text[: _MAX_VALUE - 4]}..."'
