"""Specify tiles: a fine slice and the coarse context around it, in micrometres or in level-0 pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from darefine_qupath.errors import MissingMppError, TileError
from darefine_qupath.geometry import MPP_LIMITS
from darefine_qupath.limits import require_finite

__all__ = ["FORMER_NAMES", "PixelSpec", "Placement", "TileSpec", "with_current_names"]

Placement = Literal["parent", "centred"]

FORMER_NAMES = {"size_px": "input_px", "context_size_px": "context_input_px"}
"""Names of fields in files written before, and what they are called now."""

_PLACEMENTS = ("parent", "centred")
_LARGEST_INPUT = 8192
"""Side in pixels of what a network is fed; a batch of them must fit into memory."""
_LARGEST = 1_000_000
"""Side on the slide, in level-0 pixels or micrometres; no slide is larger."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelSpec:
    """A `TileSpec` on one slide: sides of slice and context in its level-0 pixels.

    Attributes
    ----------
    slice_px, context_px, stride_px : int
        Side of the slice, side of the context and step from slice to slice, in level-0 pixels.
    input_px, context_input_px : int
        Sides of slice and context as fed to the network.
    placement : str
        ``"parent"`` or ``"centred"``.
    """

    slice_px: int
    context_px: int
    stride_px: int
    input_px: int
    context_input_px: int
    placement: Placement = "parent"

    def __post_init__(self) -> None:
        _check_limits(self)
        _check_order(self.slice_px, self.context_px, self.stride_px, "px")

    @property
    def slice_downsample(self) -> float:
        """Level-0 pixels per pixel of the slice."""
        return self.slice_px / self.input_px

    @property
    def context_downsample(self) -> float:
        """Level-0 pixels per pixel of the context."""
        return self.context_px / self.context_input_px


@dataclass(frozen=True, kw_only=True, slots=True)
class TileSpec:
    """Geometry of the tiles, stored in the dataset and in the checkpoint.

    Give one triple: micrometres (a slide's mpp turns them into pixels) or level-0 pixels (any slide, mpp unknown).

    Attributes
    ----------
    input_px : int
        Side of the slice as fed to the network.
    context_input_px : int or None
        Side of the context as fed to the network; None means `input_px`.
    slice_um, context_um, stride_um : float or None
        Side of the slice, side of the context and step from slice to slice, in micrometres.
    slice_px, context_px, stride_px : int or None
        The same in level-0 pixels.
    placement : str
        ``"parent"``: contexts tile the slide on a grid and slices are cut inside them, so that many slices share a
        context. ``"centred"``: every slice has a context of its own around the same centre.

    Raises
    ------
    TileError
        If none or both triples are given, or the sizes do not fit each other.
    """

    input_px: int = 500
    context_input_px: int | None = None
    slice_um: float | None = None
    context_um: float | None = None
    stride_um: float | None = None
    slice_px: int | None = None
    context_px: int | None = None
    stride_px: int | None = None
    placement: Placement = "parent"

    def __post_init__(self) -> None:
        if self.placement not in _PLACEMENTS:
            raise TileError(f"placement is {self.placement!r}; it must be one of {list(_PLACEMENTS)}")
        self._check_types()
        _check_limits(self)
        micrometers, pixels = self._triple("um"), self._triple("px")
        given = [triple for triple in (micrometers, pixels) if any(value is not None for value in triple)]
        if len(given) != 1 or None in given[0]:
            raise TileError(
                f"Give slice, context and stride, all three in micrometres or all three in level-0 pixels; got "
                f"slice/context/stride_um = {micrometers}, _px = {pixels}"
            )
        _check_order(*given[0], "um" if self.is_physical else "px")

    def _check_types(self) -> None:
        """Refuse what a file may hold instead of a number."""
        for name, value in asdict(self).items():
            kinds = (int, float) if name.endswith("_um") else (int,)
            is_left_out = value is None and name != "input_px"
            if name != "placement" and not is_left_out and (isinstance(value, bool) or not isinstance(value, kinds)):
                raise TileError(f"{name} = {value!r} must be a finite {'' if float in kinds else 'whole '}number")

    def _triple(self, unit: str) -> tuple[Any, Any, Any]:
        return (getattr(self, f"slice_{unit}"), getattr(self, f"context_{unit}"), getattr(self, f"stride_{unit}"))

    @classmethod
    def paper(cls) -> TileSpec:
        """Return slices of 1000 px every 500 px inside contexts of 5000 px, both resized to 500 px [1]_.

        References
        ----------
        .. [1] DA-RefineNet, arXiv:1907.06358: 81 slices share a context.
        """
        return cls(input_px=500, slice_px=1000, context_px=5000, stride_px=500)

    @property
    def is_physical(self) -> bool:
        """Whether the sides are micrometres, so that every slide needs an mpp."""
        return self.slice_um is not None

    def at(self, mpp: float | None) -> PixelSpec:
        """Give the sides in level-0 pixels of a slide.

        The stride is rounded to whole pixels first; a side that is a whole multiple of the stride in micrometres
        is the same multiple in pixels, so that the grid closes without gaps or accidental overlap.

        Parameters
        ----------
        mpp : float or None
            Micrometres per level-0 pixel of the slide; not needed when the spec is in pixels.

        Returns
        -------
        PixelSpec
            All sides at least 1 px.

        Raises
        ------
        MissingMppError
            If `mpp` is outside `MPP_LIMITS`, or None where the spec is in micrometres.
        TileError
            If the sides in pixels are too large.
        """
        if self.is_physical or mpp is not None:
            self._check_mpp(mpp)
        if self.slice_um is None or self.context_um is None or self.stride_um is None or mpp is None:
            # __post_init__ has checked that the other triple is there.
            return self._pixels(self.slice_px or 0, self.context_px or 0, self.stride_px or 0)
        stride = max(1, round(self.stride_um / mpp))
        side = _multiple(self.slice_um, self.stride_um, stride)
        return self._pixels(side, _multiple(self.context_um, self.slice_um, side), stride)

    def _check_mpp(self, mpp: float | None) -> None:
        least, largest = MPP_LIMITS
        if mpp is None or not least <= mpp <= largest:
            tiles = "The" if self.slice_um is None else f"The tiles are {self.slice_um:g} um wide and the"
            raise MissingMppError(
                f"{tiles} pixel size of the slide is {mpp}; it must be {least:g} to {largest:g} um: give it with --mpp "
                f"or set the pixel size of the image in QuPath"
            )

    def _pixels(self, side: int, context: int, stride: int) -> PixelSpec:
        return PixelSpec(
            slice_px=side,
            context_px=max(side, context),
            stride_px=stride,
            input_px=self.input_px,
            context_input_px=self.context_input_px or self.input_px,
            placement=self.placement,
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; `from_json` gives the same spec back."""
        return asdict(self)

    def for_digest(self) -> dict[str, Any]:
        """Return the values under the names of the first files, so that digests of them stay what they were."""
        former = {name: old for old, name in FORMER_NAMES.items()}
        return {former.get(name, name): value for name, value in self.to_json().items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TileSpec:
        """Rebuild the spec that `to_json` wrote, today or under `FORMER_NAMES`."""
        try:
            return cls(**with_current_names(data))
        except TypeError as error:
            raise TileError(f"Not a tile spec: {error}") from None


def with_current_names(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table whose keys may be `FORMER_NAMES` with the names of today."""
    return {FORMER_NAMES.get(name, name): value for name, value in table.items()}


def _check_limits(spec: PixelSpec | TileSpec) -> None:
    """Refuse sides that no slide or no memory has room for."""
    require_finite(spec, TileError)
    for field in fields(spec):
        value = getattr(spec, field.name)
        if field.name == "placement" or value is None:
            continue
        if field.name.endswith("_px") and value < 1:
            raise TileError(f"{field.name} must be at least 1 pixel, got {value}")
        largest = _LARGEST_INPUT if field.name.endswith("input_px") else _LARGEST
        if value > largest:
            raise TileError(f"{field.name} = {value:g} is too large; it must be at most {largest:,}")


def _check_order(side: float, context: float, stride: float, unit: str) -> None:
    if not 0 < stride <= side <= context:
        raise TileError(
            f"A stride of {stride:g} {unit}, a slice of {side:g} {unit} and a context of {context:g} {unit} do not "
            f"fit: it must be 0 < stride <= slice <= context"
        )


def _multiple(length_um: float, unit_um: float, unit_px: int) -> int:
    """Convert a length to pixels, exactly where it is a whole multiple of a unit of `unit_px` pixels."""
    ratio = length_um / unit_um
    whole = round(ratio)
    return whole * unit_px if abs(ratio - whole) < 1e-6 else max(unit_px, round(ratio * unit_px))
