"""Sampling: shares, caps and orders, as arithmetic on an index."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from darefine_qupath.classes import ClassMap
from darefine_qupath.errors import TileError
from darefine_qupath.geometry import Size
from darefine_qupath.tiles.index import TileImage, TileIndex
from darefine_qupath.tiles.sampling import cap_tiles, epoch_order, expected_shares, rarest_class, tile_weights
from darefine_qupath.tiles.spec import TileSpec

NAMES = ("Normal", "Benign", "Invasive")
properties = settings(deadline=None, derandomize=True, max_examples=40)


def index_of(counts: object, images: object = None) -> TileIndex:
    """Tiles side by side with these pixels per class, of 100 each; the rest is ignored."""
    table = np.asarray(counts, np.int64).reshape(-1, 3)
    number = len(table)
    image = np.zeros(number, np.int64) if images is None else np.asarray(images, np.int64)
    x = np.arange(number) * 10
    rows = np.column_stack([image, x, 0 * x, x, 0 * x, table, 100 - table.sum(axis=1)])
    spec = TileSpec(input_px=10, slice_px=10, context_px=10, stride_px=10)
    sources = tuple(TileImage(id=str(i), name=f"slide {i}", size=Size(10 * number + 10, 10)) for i in range(4))
    return TileIndex.of_rows(spec, ClassMap(names=NAMES), sources, rows)


TILES = index_of([[100, 0, 0]] * 90 + [[0, 100, 0]] * 9 + [[50, 0, 50]] * 6)
COUNTS = arrays.arrays(np.int64, st.tuples(st.integers(1, 60), st.just(3)), elements=st.integers(0, 33)).filter(
    lambda table: (table.sum(axis=1) > 0).all()
)


def test_full_balance_shows_every_class_alike() -> None:
    shares = expected_shares(TILES, tile_weights(TILES))
    assert shares == pytest.approx([1 / 3, 1 / 3, 1 / 3], abs=0.005)


def test_no_balance_draws_every_tile_alike() -> None:
    assert tile_weights(TILES, balance=0) == pytest.approx(np.ones(len(TILES)))


def test_half_a_balance_lies_half_way() -> None:
    natural = TILES.class_pixels / TILES.class_pixels.sum()
    shares = expected_shares(TILES, tile_weights(TILES, balance=0.5))
    assert shares == pytest.approx((natural + 1 / 3) / 2, abs=0.005)


def test_a_class_that_no_tile_holds_is_left_out() -> None:
    tiles = index_of([[100, 0, 0]] * 9 + [[0, 50, 0]])
    assert expected_shares(tiles, tile_weights(tiles)) == pytest.approx([0.5, 0.5, 0], abs=0.005)


@given(COUNTS, st.floats(0, 1), st.floats(1, 50))
@properties
def test_weights_are_positive_with_mean_1_and_bounded(table: np.ndarray, balance: float, max_ratio: float) -> None:
    weights = tile_weights(index_of(table), balance=balance, max_ratio=max_ratio)
    assert (weights > 0).all()
    assert weights.mean() == pytest.approx(1)
    assert weights.max() <= max_ratio * 1.001


@given(COUNTS)
@properties
def test_balance_never_starves_the_rarest_class(table: np.ndarray) -> None:
    tiles = index_of(table)
    natural = tiles.class_pixels / tiles.class_pixels.sum()
    rarest = np.where(natural > 0, natural, 2).argmin()
    assert expected_shares(tiles, tile_weights(tiles, max_ratio=1e9))[rarest] >= natural[rarest] - 1e-6


def test_hard_tiles_come_oftener() -> None:
    hard = {TILES.ids()[0]: 3.0, "another/0_0": 9.0}
    plain, weights = tile_weights(TILES), tile_weights(TILES, hard=hard)
    assert weights[0] / weights[1] == pytest.approx(3 * plain[0] / plain[1])
    assert weights.mean() == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"balance": 1.5}, "balance must lie in 0..1 and max_ratio be 1 or more, got 1.5"),
        ({"max_ratio": 0.5}, "got 1.0 and 0.5"),
        ({"hard": {"0/0_0": 0.0}}, "weight of a hard tile must be positive, got 0.0"),
    ],
    ids=["balance", "ratio", "hard"],
)
def test_weights_that_make_no_sense_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(TileError, match=message):
        tile_weights(TILES, **arguments)  # type: ignore[arg-type]


def test_the_rarest_class_needs_a_hundredth_of_the_tile() -> None:
    tiles = index_of([[100, 0, 0], [60, 40, 0], [99, 1, 0], [90, 5, 1], [0, 50, 0]])
    assert rarest_class(tiles).tolist() == [0, 1, 1, 2, 1]


@given(COUNTS, st.integers(1, 20), st.integers(1, 8), st.integers(0, 9))
@properties
def test_caps_hold_and_take_no_more_than_they_must(
    table: np.ndarray, per_image: int, per_class: int, seed: int
) -> None:
    tiles = index_of(table, np.arange(len(table)) % 3)
    capped = cap_tiles(tiles, per_image=per_image, seed=seed)
    for image in range(3):
        assert (capped.image == image).sum() == min(per_image, (tiles.image == image).sum())
    capped = cap_tiles(tiles, per_image_class=per_class, seed=seed)
    label = rarest_class(tiles)
    kept = np.isin(tiles.ids(), capped.ids())
    for image in range(3):
        for name in range(3):
            group = (tiles.image == image) & (label == name)
            assert (group & kept).sum() == min(per_class, group.sum())


def test_a_cap_depends_on_its_seed_alone() -> None:
    assert cap_tiles(TILES, per_image=20, seed=1).ids() == cap_tiles(TILES, per_image=20, seed=1).ids()
    assert cap_tiles(TILES, per_image=20, seed=1).ids() != cap_tiles(TILES, per_image=20, seed=2).ids()
    assert cap_tiles(TILES).ids() == TILES.ids()


@pytest.mark.parametrize("name", ["per_image", "per_image_class"])
def test_a_cap_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(TileError, match=f"{name} must be at least 1, got 0"):
        cap_tiles(TILES, **{name: 0})  # type: ignore[arg-type]


def test_without_weights_every_tile_comes_once() -> None:
    order = epoch_order(TILES, seed=0, epoch=0)
    assert sorted(order.tolist()) == list(range(len(TILES)))
    assert order.tolist() != sorted(order.tolist())


@given(
    arrays.arrays(np.float64, st.integers(1, 50), elements=st.floats(0, 5)).filter(lambda w: w.sum() > 0.01),
    st.integers(1, 300),
    st.integers(0, 9),
)
@properties
def test_every_tile_comes_as_often_as_its_weight_says(weights: np.ndarray, num_samples: int, epoch: int) -> None:
    tiles = index_of([[1, 1, 1]] * len(weights))
    order = epoch_order(tiles, weights, seed=0, epoch=epoch, num_samples=num_samples)
    wanted = weights / weights.sum() * num_samples
    drawn = np.bincount(order, minlength=len(weights))
    assert len(order) == num_samples
    assert (drawn >= np.floor(wanted - 1e-6)).all()
    assert (drawn <= np.ceil(wanted + 1e-6)).all()


def test_an_order_is_a_function_of_seed_and_epoch() -> None:
    first = epoch_order(TILES, seed=3, epoch=1)
    assert (epoch_order(TILES, seed=3, epoch=1) == first).all()
    assert (epoch_order(TILES, seed=3, epoch=2) != first).any()
    assert (epoch_order(TILES, seed=4, epoch=1) != first).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "num_samples = 0"),
        ({"weights": np.ones(3)}, "Weights must be 105 numbers of 0 or more"),
        ({"weights": np.zeros(105)}, "not all 0"),
        ({"weights": -np.ones(105)}, "of 0 or more"),
    ],
    ids=["samples", "shape", "zero", "negative"],
)
def test_an_order_that_makes_no_sense_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(TileError, match=message):
        epoch_order(TILES, seed=0, epoch=0, **arguments)  # type: ignore[arg-type]


def test_no_tiles_give_no_epoch() -> None:
    with pytest.raises(TileError, match="An epoch needs tiles; got 0 tiles"):
        epoch_order(index_of([]), seed=0, epoch=0)
