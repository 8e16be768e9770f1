"""Choose which tiles an epoch shows, and how often: arithmetic on an index, no copies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from darefine_qupath.errors import TileError
from darefine_qupath.tiles.index import TileIndex

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["cap_tiles", "epoch_order", "expected_shares", "rarest_class", "tile_weights"]

_ROUNDS = 200
_PRESENT = 0.01


def expected_shares(tiles: TileIndex, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of each class among the labelled pixels that draws by `weights` show on average, shape (K,)."""
    pixels = weights @ tiles.counts[:, :-1]
    return np.asarray(pixels / pixels.sum())


def tile_weights(
    tiles: TileIndex,
    *,
    balance: float = 1.0,
    hard: Mapping[str, float] | None = None,
    max_ratio: float = 20.0,
) -> NDArray[np.float64]:
    """Weigh tiles so that draws show the classes evenly, by the pixels that are really in them.

    Parameters
    ----------
    tiles : TileIndex
        The training tiles.
    balance : float, optional
        0 draws every tile alike, 1 aims at equal pixels of every class that is there, between is between.
    hard : mapping of str to float, optional
        Factor per tile id, of a former run's errors, say; 1 for tiles it does not name.
    max_ratio : float, optional
        No weight is larger than this many times the mean, so that a rare class is not learned from one tile alone.

    Returns
    -------
    ndarray of float64, shape (N,)
        Positive, with mean 1.

    Raises
    ------
    TileError
        If `balance` is not between 0 and 1, `max_ratio` is below 1, or a hard factor is not positive.
    """
    if not 0 <= balance <= 1 or not max_ratio >= 1:
        raise TileError(f"balance must lie in 0..1 and max_ratio be 1 or more, got {balance} and {max_ratio}")
    weights = _balanced(tiles.counts[:, :-1].astype(np.float64), balance)
    if hard:
        factors = np.array([hard.get(name, 1.0) for name in tiles.ids()])
        if not (np.isfinite(factors) & (factors > 0)).all():
            raise TileError(f"A weight of a hard tile must be positive, got {factors.min()}")
        weights *= factors
    return _clipped(weights, max_ratio)


def _balanced(pixels: NDArray[np.float64], balance: float) -> NDArray[np.float64]:
    """Weights linear in a tile's class shares whose expected class pixels come near the target."""
    present = pixels.sum(axis=0) > 0
    pixels = pixels[:, present]
    shares = pixels / pixels.sum(axis=1, keepdims=True)
    natural = pixels.sum(axis=0) / pixels.sum()
    target = (1 - balance) * natural + balance / len(natural)
    factors = np.ones(len(natural))
    for _ in range(_ROUNDS):
        expected = (shares @ factors) @ pixels
        # The square root damps the steps; tiles that hold several classes would make them overshoot.
        factors *= np.sqrt(target / (expected / expected.sum()))
        factors /= factors.mean()
    return np.asarray(shares @ factors)


def _clipped(weights: NDArray[np.float64], max_ratio: float) -> NDArray[np.float64]:
    """Bring weights to mean 1, none above `max_ratio`."""
    weights = weights / weights.mean()
    for _ in range(_ROUNDS):
        if weights.max() <= max_ratio * (1 + 1e-9):
            break
        weights = np.minimum(weights, max_ratio)
        weights /= weights.mean()
    return weights


def rarest_class(tiles: TileIndex) -> NDArray[np.int64]:
    """Label of each tile's rarest class, shape (N,): of those that fill at least a hundredth of its labelled pixels."""
    pixels = tiles.counts[:, :-1]
    present = pixels >= np.maximum(1, _PRESENT * pixels.sum(axis=1, keepdims=True))
    totals = pixels.sum(axis=0)
    return np.asarray(np.where(present, totals, totals.max() + 1).argmin(axis=1), np.int64)


def cap_tiles(
    tiles: TileIndex, *, per_image: int | None = None, per_image_class: int | None = None, seed: int = 0
) -> TileIndex:
    """Leave out tiles of images and classes that have too many.

    Parameters
    ----------
    tiles : TileIndex
        All tiles.
    per_image : int, optional
        Most tiles of an image.
    per_image_class : int, optional
        Most tiles of an image with the same rarest class (see `rarest_class`), so that the Normal of a
        large slide does not outnumber the rest.
    seed : int, optional
        Which tiles stay.

    Returns
    -------
    TileIndex
        What stays, in order.
    """
    for name, cap in (("per_image", per_image), ("per_image_class", per_image_class)):
        if cap is not None and cap < 1:
            raise TileError(f"{name} must be at least 1, got {cap}")
    rng = np.random.default_rng(seed)
    if per_image_class is not None:
        groups = tiles.image.astype(np.int64) * tiles.classes.num_classes + rarest_class(tiles)
        tiles = tiles.subset(_first_of_each(groups, per_image_class, rng))
    if per_image is not None:
        tiles = tiles.subset(_first_of_each(tiles.image.astype(np.int64), per_image, rng))
    return tiles


def _first_of_each(groups: NDArray[np.int64], cap: int, rng: np.random.Generator) -> NDArray[np.int64]:
    order = rng.permutation(len(groups))
    order = order[np.argsort(groups[order], kind="stable")]
    ordered = groups[order]
    starts = np.searchsorted(ordered, ordered)
    return np.asarray(np.sort(order[np.arange(len(order)) - starts < cap]))


def epoch_order(
    tiles: TileIndex,
    weights: NDArray[np.float64] | None = None,
    *,
    seed: int,
    epoch: int,
    num_samples: int | None = None,
) -> NDArray[np.int64]:
    """Draw the order in which an epoch shows the tiles.

    Every tile comes as often as its weight says, rounded down or up; without weights every tile comes once, or as
    near to it as `num_samples` allows.

    Parameters
    ----------
    tiles : TileIndex
        The training tiles.
    weights : ndarray of float64, shape (N,), optional
        From `tile_weights`.
    seed, epoch : int
        Together they decide the order.
    num_samples : int, optional
        Tiles an epoch shows; by default as many as there are.

    Returns
    -------
    ndarray of int64
        Positions in `tiles`.

    Raises
    ------
    TileError
        If there are no tiles, or the weights do not fit.
    """
    number = len(tiles)
    if not number or (num_samples is not None and num_samples < 1):
        raise TileError(f"An epoch needs tiles; got {number} tiles and num_samples = {num_samples}")
    weights = np.ones(number) if weights is None else weights
    if weights.shape != (number,) or not (weights >= 0).all() or not weights.sum() > 0:
        raise TileError(f"Weights must be {number} numbers of 0 or more, not all 0; got shape {weights.shape}")
    rng = np.random.default_rng((seed, epoch))
    return _systematic(weights, number if num_samples is None else num_samples, rng)


def _systematic(weights: NDArray[np.float64], num_samples: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Evenly spaced points on the line of shuffled weights: much less scatter than independent draws."""
    shuffled = rng.permutation(len(weights))
    edges = np.cumsum(weights[shuffled])
    points = (np.arange(num_samples) + rng.random()) / num_samples * edges[-1]
    drawn = shuffled[np.minimum(np.searchsorted(edges, points, side="right"), len(weights) - 1)]
    return np.asarray(rng.permutation(drawn), np.int64)
