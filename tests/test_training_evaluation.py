# ruff: noqa: N803 - shapes in names, as the networks have them
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from darefine_qupath.classes import IGNORE
from darefine_qupath.errors import TrainingError
from darefine_qupath.models import ContextFeatures, ModelConfig, Normalization, SegmentationNetwork
from darefine_qupath.training import evaluate
from darefine_qupath.training.distributed import ProcessGroup
from darefine_qupath.training.evaluation import _plan_batches
from tests.training_toy import toy_data

GRAY = Normalization(mean=(0, 0, 0), std=(1, 1, 1))


class ByContext(SegmentationNetwork):
    """Labels every pixel of a slice by the brightness of its context; remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__(ModelConfig(num_classes=3))
        self.shown: list[float] = []

    @property
    def encoders(self) -> dict[str, torch.nn.Module]:
        return {}

    def decode(
        self, slice_B3HW: Tensor, context: ContextFeatures, index_B: Tensor | None = None, box_B4: Tensor | None = None
    ) -> Tensor:
        raise NotImplementedError

    def forward(self, slice_B3HW: Tensor, context_B3HW: Tensor, box_B4: Tensor | None = None) -> Tensor:
        assert not self.training
        assert box_B4 is not None
        means = context_B3HW.mean(dim=(1, 2, 3))
        self.shown += [round(float(mean), 2) for mean in means]
        # Contexts of the toy tiles are, on average, 0.72, 0.42 and 0.27 bright.
        labels = (means < 0.6).long() + (means < 0.35).long()
        logits = torch.nn.functional.one_hot(labels, 3).float()
        return logits[:, :, None, None].expand(-1, -1, *slice_B3HW.shape[2:])


def test_every_labelled_pixel_is_counted_once() -> None:
    data = toy_data(7)
    matrix = evaluate(ByContext(), data, normalization=GRAY, batch_size=3)
    assert matrix.num_pixels == sum(int((data[index].mask != IGNORE).sum()) for index in range(7))
    assert matrix.counts.sum(axis=1).tolist() == data.tiles.class_pixels.tolist()


@pytest.mark.parametrize("batch_size", [1, 2, 5, 7, 20])
def test_result_does_not_depend_on_the_batches(batch_size: int) -> None:
    data = toy_data(7)
    assert evaluate(ByContext(), data, normalization=GRAY, batch_size=batch_size) == evaluate(
        ByContext(), data, normalization=GRAY
    )


def test_contexts_say_half_of_every_tile_here() -> None:
    """The toy context has the colour of one of the two classes of its tile."""
    assert 0.35 < evaluate(ByContext(), toy_data(9), normalization=GRAY).accuracy < 0.65


def test_blank_contexts_are_white() -> None:
    model = ByContext()
    matrix = evaluate(model, toy_data(5), normalization=GRAY, context="blank")
    assert model.shown == [1.0] * 5
    assert matrix.counts[:, 1:].sum() == 0


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_shuffled_contexts_are_those_of_other_tiles(batch_size: int) -> None:
    data, normal, shuffled = toy_data(7), ByContext(), ByContext()
    evaluate(normal, data, normalization=GRAY, batch_size=1)
    evaluate(shuffled, data, normalization=GRAY, batch_size=batch_size, context="shuffled")
    order = [row for placed in _plan_batches(7, "shuffled", batch_size, ProcessGroup()) for row in placed.tiles]
    assert sorted(order) == list(range(7))
    assert sorted(shuffled.shown) == sorted(normal.shown)


@given(num_tiles=st.integers(2, 60), batch_size=st.integers(1, 12))
@settings(deadline=None, derandomize=True)
def test_no_tile_is_shuffled_alone(num_tiles: int, batch_size: int) -> None:
    sizes = [len(placed.tiles) for placed in _plan_batches(num_tiles, "shuffled", batch_size, ProcessGroup())]
    assert sum(sizes) == num_tiles
    assert 2 <= min(sizes) <= max(sizes) <= max(3, batch_size)


def test_processes_share_the_tiles() -> None:
    parts = [list(_plan_batches(10, "normal", 3, ProcessGroup(rank=rank, size=3))) for rank in range(3)]
    rows = [row for part in parts for placed in part for row in placed.tiles]
    assert sorted(rows) == list(range(10))


def test_model_goes_back_to_its_mode() -> None:
    model = ByContext().train()
    evaluate(model, toy_data(2), normalization=GRAY)
    assert model.training


def test_scores_that_are_no_numbers_are_no_class() -> None:
    class Faulty(ByContext):
        def forward(self, slice_B3HW: Tensor, context_B3HW: Tensor, box_B4: Tensor | None = None) -> Tensor:
            return super().forward(slice_B3HW, context_B3HW, box_B4) / 0

    with pytest.raises(TrainingError, match=r"scores of \d+ pixels are not finite"):
        evaluate(Faulty(), toy_data(2), normalization=GRAY)


def test_refusals() -> None:
    with pytest.raises(TrainingError, match="no context mode 'dark'"):
        evaluate(ByContext(), toy_data(2), context="dark")
    with pytest.raises(TrainingError, match="no tiles to evaluate"):
        evaluate(ByContext(), toy_data(0))
    with pytest.raises(TrainingError, match="A single tile has no other"):
        evaluate(ByContext(), toy_data(1), context="shuffled")
