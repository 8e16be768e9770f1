"""Share groups of tiles out among parts so that each gets its share of every class."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from darefine_qupath.errors import TileError
from darefine_qupath.tiles.index import TileIndex
from darefine_qupath.tiles.roles import Group, Role

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["TileGroups", "parts_to_assign"]

_ALL_SUBSETS = 12
"""Groups up to which every subset is tried."""
_RANDOM_SUBSETS = 4000


def parts_to_assign(validation: float, test: float, taken: Collection[Role]) -> list[tuple[Role, float]]:
    """List the parts to fill one after the other, each with its share of what is left."""
    if validation < 0 or test < 0 or validation + test >= 1:
        raise TileError(f"validation = {validation} and test = {test} must be shares that leave some to train on")
    parts: list[tuple[Role, float]] = [("test", test), ("validation", validation / (1 - test))]
    return [(role, share) for role, share in parts if share > 0 and role not in taken]


@dataclass(frozen=True)
class TileGroups:
    """Groups of tiles that a split keeps together, with what they hold.

    Attributes
    ----------
    names : list of tuple
        Sorted, so that the order of the images does not matter.
    content : ndarray of float64, shape (U, K + 1)
        Share of each class's pixels and, last, of the tiles.
    """

    names: list[Group]
    content: NDArray[np.float64]

    @classmethod
    def of(cls, tiles: TileIndex, groups: list[Group]) -> TileGroups:
        """Count what each group holds; `groups` names that of every tile."""
        names = sorted(set(groups))
        numbers = {name: number for number, name in enumerate(names)}
        content = np.zeros((len(names), tiles.classes.num_classes + 1))
        columns = np.column_stack([tiles.counts[:, :-1], np.ones(len(tiles), np.int64)])
        np.add.at(content, [numbers[group] for group in groups], columns)
        return cls(names, content / np.maximum(content.sum(axis=0), 1))

    def assign(
        self, free: list[int], parts: Sequence[tuple[Role, float]], rng: np.random.Generator, *, has_train: bool
    ) -> dict[Group, Role]:
        """Give the groups in `free` roles: each part takes its share of what is left, and training the rest."""
        roles: dict[Group, Role] = {}
        for number, (role, share) in enumerate(parts):
            left_over = len(parts) - 1 - number + (not has_train)
            chosen = self._pick(free, share, rng, most=len(free) - left_over)
            roles.update((self.names[group], role) for group in chosen)
            free = [group for group in free if group not in chosen]
        return {**roles, **{self.names[group]: "train" for group in free}}

    def deal(self, free: list[int], k: int, rng: np.random.Generator) -> dict[int, int]:
        """Deal groups to `k` folds: the largest first, each where it evens the folds out most."""
        order = sorted(rng.permutation(free).tolist(), key=lambda group: -self.content[group].max())
        folds = np.zeros((k, self.content.shape[1]))
        fold_of: dict[int, int] = {}
        for number, group in enumerate(order):
            empty = [fold for fold in range(k) if fold not in fold_of.values()]
            must_fill = len(order) - number <= len(empty)
            unevenness = {}
            for fold in empty if must_fill else range(k):
                trial = folds.copy()
                trial[fold] += self.content[group]
                unevenness[fold] = trial.std(axis=0).sum()
            best = min(unevenness, key=lambda fold: unevenness[fold])
            folds[best] += self.content[group]
            fold_of[group] = best
        return fold_of

    def _pick(self, free: list[int], share: float, rng: np.random.Generator, *, most: int) -> set[int]:
        """Choose at most `most` groups with nearly `share` of everything in `free`; every class on both sides first."""
        order = rng.permutation(free)
        candidates = _subsets(len(order), share, rng)
        candidates = candidates[(candidates.sum(axis=1) >= 1) & (candidates.sum(axis=1) <= most)]
        content = self.content[order]
        content = content[:, content.sum(axis=0) > 0]
        picked = candidates @ (content / content.sum(axis=0))
        # A class that training lacks is worse than one that validation lacks, and both are worse than uneven shares.
        lacks_rest, lacks_picked = (picked > 1 - 1e-12).sum(axis=1), (picked < 1e-12).sum(axis=1)
        unevenness = np.abs(picked - share).mean(axis=1).round(9)
        best = np.lexsort((unevenness, lacks_picked, lacks_rest))[0]
        return {int(group) for group in order[candidates[best]]}


def _subsets(number: int, share: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """List candidate subsets, shape (candidates, number): all of a few groups, else random ones of about that share."""
    if number <= _ALL_SUBSETS:
        return np.array(list(product((False, True), repeat=number)), bool).reshape(-1, number)
    wanted = np.clip(np.round(number * share * rng.uniform(0.5, 1.5, _RANDOM_SUBSETS)), 1, number - 1)
    ranks = rng.permuted(np.tile(np.arange(number), (_RANDOM_SUBSETS, 1)), axis=1)
    return np.asarray(ranks < wanted[:, None])
