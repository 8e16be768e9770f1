"""Splits: no case, slide or pixel on two sides, and every class on both where that can be."""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from darefine_qupath.classes import ClassMap
from darefine_qupath.errors import TileError
from darefine_qupath.geometry import Size
from darefine_qupath.tiles.index import TileImage, TileIndex
from darefine_qupath.tiles.plan import plan_training_tiles
from darefine_qupath.tiles.roles import ROLE_KEY, Split, TilePart, explicit_roles, roles_of_metadata
from darefine_qupath.tiles.spatial_split import spatial_split
from darefine_qupath.tiles.spec import TileSpec
from darefine_qupath.tiles.split import k_folds, split_images, split_tiles

properties = settings(deadline=None, derandomize=True, max_examples=30)


def index_of(slides: list[tuple[str | None, list[int]]], tiles_each: int = 3) -> TileIndex:
    """One image per (case, pixels per class) with this many tiles."""
    images = tuple(
        TileImage(id=f"i{number}", name=f"slide {number}", size=Size(1000, 100), case=case)
        for number, (case, _) in enumerate(slides)
    )
    rows = [
        (number, 10 * tile, 0, 10 * tile, 0, *counts, 100 - sum(counts))
        for number, (_, counts) in enumerate(slides)
        for tile in range(tiles_each)
    ]
    names = tuple("ABCDEFG"[: len(slides[0][1])])
    spec = TileSpec(input_px=10, slice_px=10, context_px=10, stride_px=10)
    return TileIndex.of_rows(spec, ClassMap(names=names), images, rows)


TEN = index_of([(None, [50, 50 * (number % 2)]) for number in range(10)])
SLIDES = st.lists(
    st.tuples(st.sampled_from([None, None, "p", "q", "r"]), st.lists(st.integers(0, 30), min_size=3, max_size=3)),
    min_size=2,
    max_size=16,
).filter(lambda slides: all(sum(counts) for _, counts in slides))


def classes_of(tiles: TileIndex) -> set[int]:
    return set(np.flatnonzero(tiles.class_tiles).tolist())


@given(SLIDES, st.floats(0.05, 0.6), st.sampled_from([0.0, 0.2]), st.integers(0, 3))
@properties
def test_no_case_is_on_two_sides(
    slides: list[tuple[str | None, list[int]]], validation: float, test: float, seed: int
) -> None:
    tiles = index_of(slides)
    groups = {image.group for image in tiles.images}
    assume(len(groups) >= 2 + (test > 0))
    split = split_images(tiles, validation=validation, test=test, seed=seed)
    roles = {}
    for image in tiles.images:
        assert roles.setdefault(image.group, split.images[image.id]) == split.images[image.id]
    assert set(roles.values()) == {"train", "validation", *(["test"] if test else [])}
    parts = [split.part(tiles, role) for role in ("train", "validation", "test")]
    assert sum(len(part) for part in parts) == len(tiles)


@given(SLIDES)
@properties
def test_every_class_is_on_both_sides_when_some_split_can(slides: list[tuple[str | None, list[int]]]) -> None:
    tiles = index_of(slides[:8])
    groups = sorted({image.group for image in tiles.images})
    assume(len(groups) >= 2)
    split = split_images(tiles, validation=0.3)
    lacking = {
        role: len(classes_of(tiles) - classes_of(split.part(tiles, role).tiles))  # type: ignore[arg-type]
        for role in ("train", "validation")
    }
    group_of = np.array([groups.index(tiles.images[number].group) for number in tiles.image])
    possible = []
    for size in range(1, len(groups)):
        for chosen in combinations(range(len(groups)), size):
            inside = np.isin(group_of, chosen)
            rest, picked = classes_of(tiles.subset(~inside)), classes_of(tiles.subset(inside))
            possible.append((len(classes_of(tiles) - rest), len(classes_of(tiles) - picked)))
    assert (lacking["train"], lacking["validation"]) == min(possible)


def test_many_slides_are_split_near_the_share_asked_for() -> None:
    tiles = index_of([(None, [50 + number % 7, 40 - number % 5]) for number in range(60)])
    split = split_images(tiles, validation=0.25, test=0.25)
    shares = [len(split.part(tiles, role)) / len(tiles) for role in ("train", "validation", "test")]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.04)


def test_a_split_depends_on_its_seed_alone() -> None:
    assert split_images(TEN, seed=5) == split_images(TEN, seed=5)
    assert len({json.dumps(split_images(TEN, seed=seed).to_json()) for seed in range(8)}) > 1


def test_fixed_roles_stay_and_take_their_case_along() -> None:
    tiles = index_of([("p", [9, 9]), ("p", [9, 9]), ("q", [9, 9]), ("r", [9, 9])])
    split = split_images(tiles, fixed={"i0": "test"})
    assert split.images["i1"] == "test"
    assert sorted(split.images.values()) == ["test", "test", "train", "validation"]


def test_roles_that_are_all_fixed_are_taken_as_they_are() -> None:
    fixed = {"i0": "validation", "i1": "train"}
    tiles = index_of([(None, [9, 0]), (None, [0, 9])])
    assert split_images(tiles, fixed=fixed).images == fixed  # type: ignore[arg-type]


def test_without_validation_everything_trains() -> None:
    assert set(split_images(TEN, validation=0).images.values()) == {"train"}


def test_what_a_part_lacks_is_said(caplog: pytest.LogCaptureFixture) -> None:
    split_images(index_of([(None, [9, 9]), (None, [9, 0]), (None, [9, 0])]))
    assert [record.message for record in caplog.records] == ["The validation part has no B: too few cases hold it"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"validation": -0.1}, "must be shares that leave some to train on"),
        ({"validation": 0.6, "test": 0.4}, "validation = 0.6 and test = 0.4"),
        ({"fixed": {"zz": "train"}}, r"Roles are given to images that are not there: \['zz'\]"),
        ({"fixed": {"i0": "train", "i1": "test"}}, "Images of case 'p' are fixed as train and as test"),
        ({"test": 0.2}, "2 annotated cases cannot be split into 3 parts"),
    ],
    ids=["negative", "all", "unknown", "torn", "few"],
)
def test_a_split_that_cannot_be_is_refused(arguments: dict[str, object], message: str) -> None:
    tiles = index_of([("p", [9, 9]), ("p", [9, 9]), ("q", [9, 9])])
    with pytest.raises(TileError, match=message):
        split_images(tiles, **arguments)  # type: ignore[arg-type]


def test_one_case_is_pointed_to_a_split_within() -> None:
    with pytest.raises(TileError, match=r"1 annotated cases cannot be split into 2 parts; .* split within the slides"):
        split_images(index_of([("p", [9, 9]), ("p", [9, 9])]))


def test_a_test_tile_cannot_become_a_training_tile() -> None:
    split = split_images(TEN, validation=0.2, test=0.2)
    test = split.part(TEN, "test")
    with pytest.raises(TileError, match=r"tiles are not train tiles; i\d+/0_0 of slide \d+ has the role test"):
        TilePart(role="train", tiles=test.tiles, split=split)
    with pytest.raises(TileError, match="30 tiles are not train tiles"):
        TilePart(role="train", tiles=TEN, split=Split(images={}))
    assert not set(split.part(TEN, "train").tiles.ids()) & set(test.tiles.ids())


def test_a_role_has_a_known_name() -> None:
    with pytest.raises(TileError, match="The role of 'i0' is 'dev'; it must be one of"):
        Split(images={"i0": "dev"})  # type: ignore[dict-item]


def test_json_gives_the_same_split_back() -> None:
    split = split_images(TEN)
    assert Split.from_json(json.loads(json.dumps(split.to_json()))) == split


def test_roles_go_to_metadata_and_come_back() -> None:
    split = split_images(TEN)
    noted = [
        TileImage(id=image.id, name=image.name, size=image.size, metadata=split.metadata(image.id))
        for image in TEN.images
    ]
    assert roles_of_metadata(noted) == split.images
    assert split.metadata("another") == {}
    wrong = TileImage(id="x", name="x", size=Size(1, 1), metadata={ROLE_KEY: "dev"})
    with pytest.raises(TileError, match=r"darefine.role of these images is not one of .*'x': 'dev'"):
        roles_of_metadata([wrong])


def test_lists_name_images_by_id_name_or_case() -> None:
    tiles = index_of([("p", [9, 9]), ("p", [9, 9]), ("q", [9, 9]), (None, [9, 9])])
    roles = explicit_roles(tiles.images, {"test": ["p"], "validation": ["slide 2"], "train": ["i3"]})
    assert roles == {"i0": "test", "i1": "test", "i2": "validation", "i3": "train"}


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"test": ["nobody"]}, "The test list names 'nobody', which is not an image; there are 'slide 0'"),
        ({"test": ["i0"], "train": ["slide 0"]}, "Image 'slide 0' is in the lists of test and of train"),
    ],
    ids=["unknown", "twice"],
)
def test_lists_that_make_no_sense_are_refused(lists: dict[str, list[str]], message: str) -> None:
    with pytest.raises(TileError, match=message):
        explicit_roles(TEN.images, lists)  # type: ignore[arg-type]


@given(SLIDES, st.integers(2, 5), st.integers(0, 3))
@properties
def test_every_case_validates_in_one_fold(slides: list[tuple[str | None, list[int]]], k: int, seed: int) -> None:
    tiles = index_of(slides)
    groups = {image.group for image in tiles.images}
    assume(len(groups) >= k)
    folds = k_folds(tiles, k, seed=seed)
    validating = [{image.group for image in tiles.images if fold.images[image.id] == "validation"} for fold in folds]
    assert all(validating)
    assert sorted(group for part in validating for group in part) == sorted(groups)
    assert all(set(fold.images.values()) == {"train", "validation"} for fold in folds)


def test_folds_share_the_classes_out() -> None:
    tiles = index_of([(None, [90, 0])] * 8 + [(None, [0, 90])] * 4)
    for fold in k_folds(tiles, 4):
        assert classes_of(fold.part(tiles, "validation").tiles) == {0, 1}
        assert len(fold.part(tiles, "validation")) == 9


def test_test_images_are_in_no_fold() -> None:
    for fold in k_folds(TEN, 3, test=["i4"]):
        assert fold.images["i4"] == "test"


@pytest.mark.parametrize("k", [1, 11])
def test_folds_need_as_many_cases(k: int) -> None:
    with pytest.raises(TileError, match=f"10 annotated cases give 2 to 10 folds, not {k}"):
        k_folds(TEN, k)


def one_slide(spec: TileSpec, size: tuple[int, int], seed: int = 0) -> TileIndex:
    """All tiles of one slide, each with some pixels of one or two of three classes."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(100, [0.6, 0.3, 0.1], size=10_000) * rng.integers(0, 2, (10_000, 3))
    counts[:, 0] += 1
    rows = [
        (0, pair.slice.x, pair.slice.y, pair.context.x, pair.context.y, *counts[number], 0)
        for number, pair in enumerate(plan_training_tiles(size, spec.at(None)))
    ]
    image = TileImage(id="1", name="slide", size=Size(*size))
    return TileIndex.of_rows(spec, ClassMap(names=("A", "B", "C")), (image,), rows)


@given(
    st.sampled_from(["parent", "centred"]),
    st.integers(1, 4),
    st.integers(1, 5),
    st.tuples(*[st.integers(150, 400)] * 2),
    st.sampled_from([0.0, 0.2]),
)
@properties
def test_no_pixel_is_in_slices_of_two_sides(
    placement: str, overlap: int, contexts: int, size: tuple[int, int], test: float
) -> None:
    spec = TileSpec(
        input_px=8,
        slice_px=20,
        stride_px=20 // overlap,
        context_px=20 * contexts,
        placement=placement,  # type: ignore[arg-type]
    )
    tiles = one_slide(spec, size)
    split = spatial_split(tiles, test=test)
    owner = np.full((size[1] + 40, size[0] + 40), -1)
    for number, role in enumerate(("train", "validation", "test")):
        part = split.part(tiles, role)  # type: ignore[arg-type]
        assert len(part) > 0 or (role == "test" and not test)
        for record in part.tiles:
            box = record.pair.slice
            under = owner[box.y : box.bottom, box.x : box.right]
            assert np.isin(under, [-1, number]).all()
            under[:] = number
    assert split.is_spatial


def test_parents_stay_whole_and_the_log_says_what_it_is(caplog: pytest.LogCaptureFixture) -> None:
    tiles = one_slide(TileSpec(input_px=8, slice_px=20, stride_px=10, context_px=100), (500, 300))
    split = spatial_split(tiles)
    roles = split.roles(tiles)
    by_context: dict[tuple[int, ...], set[object]] = {}
    for corner, role in zip(tiles.context_xy.tolist(), roles, strict=True):
        by_context.setdefault(tuple(corner), set()).add(role)
    assert all(len(found) == 1 for found in by_context.values())
    assert "other parts of the slides that train" in caplog.text
    assert Split.from_json(split.to_json()) == split
    assert len(split.part(tiles, "validation")) / len(tiles) == pytest.approx(0.2, abs=0.05)


def test_a_single_context_is_parted_by_slices() -> None:
    tiles = one_slide(TileSpec(input_px=8, slice_px=20, stride_px=20, context_px=100), (100, 100))
    split = spatial_split(tiles)
    assert len(split.part(tiles, "train")) + len(split.part(tiles, "validation")) == 25


def test_two_tiles_cannot_be_parted() -> None:
    tiles = one_slide(TileSpec(input_px=8, slice_px=20, stride_px=20, context_px=100), (40, 20))
    with pytest.raises(TileError, match=r"2 tiles are too few to split into training and \['validation'\]"):
        spatial_split(tiles)


def test_fixed_images_are_not_parted() -> None:
    spec = TileSpec(input_px=8, slice_px=20, stride_px=20, context_px=100)
    one = one_slide(spec, (300, 200))
    images = (one.images[0], TileImage(id="2", name="other", size=one.images[0].size))
    rows = np.column_stack([np.arange(len(one)) % 2, one.slice_xy, one.context_xy, one.counts])
    tiles = TileIndex.of_rows(spec, one.classes, images, rows)
    split = split_tiles(tiles, fixed={"2": "test"})
    assert split.is_spatial
    assert (split.part(tiles, "test").tiles.image == 1).all()
    assert len(split.part(tiles, "test")) == (tiles.image == 1).sum()
    assert (split.part(tiles, "train").tiles.image == 0).all()
    assert len(split.part(tiles, "validation")) > 0


def test_enough_cases_are_split_by_case() -> None:
    assert split_tiles(TEN, seed=3) == split_images(TEN, seed=3)
    one = index_of([("p", [9, 9]), ("p", [9, 9])], tiles_each=9)
    assert split_tiles(one).is_spatial
    assert not split_tiles(one, validation=0).is_spatial
