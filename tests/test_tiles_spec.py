"""Tile geometry: what is refused, and how micrometres become pixels."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darefine_qupath.errors import MissingMppError, TileError
from darefine_qupath.tiles.spec import PixelSpec, TileSpec

properties = settings(deadline=None, derandomize=True)


def test_the_paper_s_geometry() -> None:
    spec = TileSpec.paper().at(None)
    assert (spec.slice_px, spec.context_px, spec.stride_px) == (1000, 5000, 500)
    assert (spec.input_px, spec.context_input_px, spec.placement) == (500, 500, "parent")
    assert (spec.slice_downsample, spec.context_downsample) == (2, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "all three in micrometres or all three in level-0 pixels"),
        ({"slice_um": 100.0, "context_um": 500.0}, "Give slice, context and stride"),
        ({"slice_um": 1.0, "context_um": 5.0, "stride_um": 1.0, "slice_px": 10}, "Give slice, context and stride"),
        ({"slice_px": 100, "context_px": 50, "stride_px": 50}, "stride <= slice <= context"),
        ({"slice_px": 100, "context_px": 500, "stride_px": 101}, "stride of 101 px"),
        ({"slice_um": 100.0, "context_um": 500.0, "stride_um": 0.0}, "stride of 0 um"),
        ({"slice_px": 1, "context_px": 1, "stride_px": 1, "input_px": 0}, "input_px must be at least 1 pixel, got 0"),
        (
            {"slice_px": 1, "context_px": 1, "stride_px": 1, "context_input_px": -3},
            "context_input_px must be at least 1",
        ),
        ({"slice_px": 1, "context_px": 1, "stride_px": 1, "placement": "left"}, "placement is 'left'"),
    ],
    ids=["none", "two of three", "both", "context", "stride", "zero", "size", "context size", "placement"],
)
def test_a_spec_that_makes_no_sense_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(TileError, match=message):
        TileSpec(**arguments)  # type: ignore[arg-type]


def test_pixel_specs_are_checked_too() -> None:
    with pytest.raises(TileError, match="stride_px must be at least 1 pixel, got 0"):
        PixelSpec(slice_px=1, context_px=1, stride_px=0, input_px=1, context_input_px=1)


TRIPLE = ("slice", "context", "stride")


@pytest.mark.parametrize("unit", ["px", "um"])
@pytest.mark.parametrize("field", [*TRIPLE, "input_px", "context_input_px"])
@pytest.mark.parametrize("value", [10**7, float("nan"), float("inf")])
def test_sides_beyond_any_slide_are_refused_by_name(unit: str, field: str, value: float) -> None:
    field = field if field.endswith("px") else f"{field}_{unit}"
    sides = {f"{name}_{unit}": 10**7 if value == 10**7 else 100 for name in TRIPLE}
    arguments = {**sides, field: value} if field in sides else {**dict.fromkeys(sides, 100), field: value}
    with pytest.raises(TileError, match=rf"(_{unit}|{field}) = .*(too large|finite)"):
        TileSpec(**arguments)
    with pytest.raises(TileError, match=rf"(_{unit}|{field}) = .*(too large|finite)"):
        TileSpec.from_json(arguments)


@pytest.mark.parametrize("mpp", [1e300, -1.0, 0.0, float("nan"), float("inf")])
def test_a_pixel_size_that_cannot_be_is_refused_in_pixels_too(mpp: float) -> None:
    with pytest.raises(
        MissingMppError, match=rf"pixel size of the slide is {re.escape(str(mpp))}; it must be 0.001 to 1000 um"
    ):
        TileSpec(slice_px=100, context_px=500, stride_px=50).at(mpp)


def test_a_tiny_pixel_size_does_not_make_tiles_of_millions_of_pixels() -> None:
    with pytest.raises(TileError, match=r"slice_px = 2e\+06 is too large; it must be at most 1,000,000"):
        TileSpec(slice_um=2000, context_um=2000, stride_um=2000).at(0.001)


@pytest.mark.parametrize("mpp", [None, 0.0, float("nan")])
def test_micrometres_need_a_pixel_size(mpp: float | None) -> None:
    with pytest.raises(MissingMppError, match=r"500 um wide and the pixel size of the slide is .*--mpp"):
        TileSpec(slice_um=500, context_um=2500, stride_um=250).at(mpp)


@given(st.floats(0.05, 4), st.integers(1, 6), st.integers(1, 10), st.floats(20, 500))
@properties
def test_whole_multiples_of_the_stride_stay_whole(mpp: float, slices: int, contexts: int, stride_um: float) -> None:
    spec = TileSpec(slice_um=slices * stride_um, context_um=contexts * slices * stride_um, stride_um=stride_um).at(mpp)
    assert spec.slice_px == slices * spec.stride_px
    assert spec.context_px == contexts * spec.slice_px
    assert abs(spec.stride_px - stride_um / mpp) <= 0.5 or spec.stride_px == 1


@given(st.floats(0.05, 50), st.tuples(*[st.floats(0.1, 5000)] * 3).map(sorted))
@properties
def test_any_slide_gets_a_legal_geometry(mpp: float, sides: list[float]) -> None:
    spec = TileSpec(stride_um=sides[0], slice_um=sides[1], context_um=sides[2]).at(mpp)
    assert 1 <= spec.stride_px <= spec.slice_px <= spec.context_px


def test_the_context_may_have_a_size_of_its_own() -> None:
    spec = TileSpec(slice_px=512, context_px=2048, stride_px=512, input_px=256, context_input_px=128).at(0.5)
    assert (spec.slice_downsample, spec.context_downsample) == (2, 16)


@pytest.mark.parametrize(
    "spec", [TileSpec.paper(), TileSpec(slice_um=467, context_um=2335.5, stride_um=200, placement="centred")], ids=str
)
def test_json_gives_the_same_spec_back(spec: TileSpec) -> None:
    assert TileSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_other_json_is_refused() -> None:
    with pytest.raises(TileError, match=r"Not a tile spec: .*colour"):
        TileSpec.from_json({"colour": "red"})
