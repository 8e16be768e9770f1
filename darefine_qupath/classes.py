"""Map path classes to labels and colors: the only place where names and labels meet.

A QuPath class whose name ends in ``*`` is not a class to learn: pixels under ``Ignore*`` are `IGNORE` whatever else
covers them; where ``Region*`` annotations exist, only their inside counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from darefine_qupath.errors import ClassMapError

__all__ = [
    "IGNORE",
    "REGION",
    "ClassMap",
    "Color",
    "PathClass",
    "default_color",
    "is_ignored",
]

IGNORE = 255
"""Label of a pixel that nothing is known of: outside the slide, unlabelled, ignored."""

REGION = "Region*"
"""Where annotations of this class exist, only their inside counts."""

UNLABELLED_IGNORE = "ignore"

_HEX_COLOR = re.compile("#?[0-9a-fA-F]{6}")


class Color(NamedTuple):
    """Red, green and blue, 0 to 255."""

    red: int
    green: int
    blue: int

    @classmethod
    def from_argb(cls, argb: int) -> Color:
        """Unpack a signed or unsigned 32-bit ARGB integer, as Java packs colors."""
        return cls((argb >> 16) & 255, (argb >> 8) & 255, argb & 255)

    @classmethod
    def from_hex(cls, text: str) -> Color:
        """Read ``#rrggbb``."""
        if not _HEX_COLOR.fullmatch(text):
            raise ClassMapError(f"{text!r} is not a colour; write it as #rrggbb")
        return cls(*bytes.fromhex(text.removeprefix("#")))

    @property
    def argb(self) -> int:
        """Opaque color as the signed 32-bit integer QuPath stores."""
        return ((255 << 24) | (self.red << 16) | (self.green << 8) | self.blue) - (1 << 32)

    @property
    def hex(self) -> str:
        """``#rrggbb``."""
        return f"#{self.red:02x}{self.green:02x}{self.blue:02x}"


# Normal, Benign, In situ, Invasive first (the paper's order), then a wheel for whatever else a project names.
_KNOWN_COLORS = {
    "normal": Color(50, 160, 60),
    "benign": Color(80, 120, 220),
    "in situ": Color(240, 170, 40),
    "invasive": Color(200, 30, 40),
    "tumor": Color(200, 0, 0),
    "stroma": Color(150, 200, 150),
    "background": Color(200, 200, 200),
}
_WHEEL = (
    Color(31, 119, 180),
    Color(255, 127, 14),
    Color(44, 160, 44),
    Color(148, 103, 189),
    Color(140, 86, 75),
    Color(227, 119, 194),
    Color(188, 189, 34),
    Color(23, 190, 207),
)


def default_color(name: str) -> Color:
    """Choose a color for a class that has none: fixed per name."""
    known = _KNOWN_COLORS.get(name.lower())
    return known or _WHEEL[sum(name.encode()) % len(_WHEEL)]


def is_ignored(path_class: str | None) -> bool:
    """Whether QuPath's ``Name*`` convention takes this class out of training."""
    return path_class is not None and path_class.endswith("*")


@dataclass(frozen=True, slots=True)
class PathClass:
    """A class of a QuPath project.

    Attributes
    ----------
    name : str
        Full name; the parts of a derived class are joined by ``": "``.
    color : Color
        As QuPath draws it.
    """

    name: str
    color: Color = Color(128, 128, 128)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassMap:
    """The training classes in label order, and which project class becomes which.

    Attributes
    ----------
    names : tuple of str
        Training classes; the index is the label.
    colors : tuple of Color
        One per name; filled from `default_color` when empty.
    sources : mapping of str to str
        Project class to training class (many to one). A training class always maps to itself.
    unlabelled : str
        ``"ignore"``, or the training class of pixels that no annotation covers.
    region_unlabelled : str
        The same inside ``Region*`` annotations; ``"ignore"`` or a training class.
    """

    names: tuple[str, ...]
    colors: tuple[Color, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    unlabelled: str = UNLABELLED_IGNORE
    region_unlabelled: str = UNLABELLED_IGNORE

    def __post_init__(self) -> None:
        if not self.names:
            raise ClassMapError("A class map needs at least one class")
        if len(self.names) > IGNORE:
            raise ClassMapError(f"{len(self.names)} classes are more than the {IGNORE} a mask can hold")
        if len(set(self.names)) != len(self.names):
            raise ClassMapError(f"A class is named twice in {list(self.names)}")
        starred = [name for name in self.names if is_ignored(name)]
        if starred:
            raise ClassMapError(f"{starred} end in '*', which QuPath means as 'not a class'")
        colors = self.colors or tuple(default_color(name) for name in self.names)
        if len(colors) != len(self.names):
            raise ClassMapError(f"{len(colors)} colours for {len(self.names)} classes")
        object.__setattr__(self, "colors", tuple(Color(*color) for color in colors))
        object.__setattr__(self, "sources", dict(self.sources))
        self._check_targets()

    def _check_targets(self) -> None:
        for source, target in self.sources.items():
            if target not in self.names:
                raise ClassMapError(f"Class {source!r} is mapped to {target!r}, which is not in {list(self.names)}")
            if source in self.names and source != target:
                raise ClassMapError(f"Class {source!r} is a training class and is mapped to {target!r}")
        for which, value in (("unlabelled", self.unlabelled), ("region_unlabelled", self.region_unlabelled)):
            if value != UNLABELLED_IGNORE and value not in self.names:
                raise ClassMapError(f"{which} = {value!r} is neither 'ignore' nor one of {list(self.names)}")

    @property
    def num_classes(self) -> int:
        """Number of training classes."""
        return len(self.names)

    @property
    def unlabelled_label(self) -> int:
        """Label of a pixel that nothing covers."""
        return self._fallback(self.unlabelled)

    @property
    def region_unlabelled_label(self) -> int:
        """Label of such a pixel inside ``Region*``."""
        return self._fallback(self.region_unlabelled)

    def _fallback(self, value: str) -> int:
        return IGNORE if value == UNLABELLED_IGNORE else self.names.index(value)

    def knows(self, path_class: str | None) -> bool:
        """Whether the class is a training class, mapped to one, or ignored by its name."""
        return path_class is None or is_ignored(path_class) or path_class in self.names or path_class in self.sources

    def label(self, path_class: str) -> int:
        """Find the label of a project class.

        Parameters
        ----------
        path_class : str
            Full class name.

        Returns
        -------
        int
            Index into `names`, `IGNORE` for a class whose name ends in ``*``.

        Raises
        ------
        ClassMapError
            If the class is not known.
        """
        if is_ignored(path_class):
            return IGNORE
        name = self.sources.get(path_class, path_class)
        if name not in self.names:
            raise ClassMapError(
                f"Path class {path_class!r} is not one of {list(self.names)}; map it in darefine.toml, [classes.map], "
                f"or end its name in '*' in QuPath"
            )
        return self.names.index(name)

    def check(self, counts: Mapping[str, int]) -> None:
        """Refuse project classes that the map does not know.

        Parameters
        ----------
        counts : mapping of str to int
            Annotations per project class.

        Raises
        ------
        ClassMapError
            Lists every unknown class with its number of annotations.
        """
        unknown = {name: number for name, number in counts.items() if not self.knows(name)}
        if unknown:
            listed = ", ".join(f"{name!r} ({number})" for name, number in sorted(unknown.items()))
            raise ClassMapError(
                f"Annotations of classes that are not mapped: {listed}; known are {list(self.names)}. Map them in "
                f"darefine.toml, [classes.map], or end the class name in '*' in QuPath"
            )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; `from_json` gives the same map back."""
        return {
            "names": list(self.names),
            "colors": [color.hex for color in self.colors],
            "sources": dict(self.sources),
            "unlabelled": self.unlabelled,
            "region_unlabelled": self.region_unlabelled,
        }

    def for_digest(self) -> dict[str, Any]:
        """Return the values under the names of the first files, so that digests of them stay what they were."""
        return {"colours" if name == "colors" else name: value for name, value in self.to_json().items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ClassMap:
        """Rebuild the class map that `to_json` wrote; files of before call the colors ``colours``."""
        try:
            texts = [*data["names"], *data["sources"], *data["sources"].values()]
            if not all(isinstance(text, str) for text in texts) or isinstance(data["names"], str):
                raise TypeError("its names are not all texts")
            return cls(
                names=tuple(data["names"]),
                colors=tuple(Color.from_hex(text) for text in data["colors" if "colors" in data else "colours"]),
                sources=data["sources"],
                unlabelled=data["unlabelled"],
                region_unlabelled=data["region_unlabelled"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ClassMapError(f"Not a class map: {error}") from None
