"""The parts of prediction: window and band, plan, engine, reading ahead, journal, score map, checks."""

# B N slices and contexts, H W pixels
# ruff: noqa: N803

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openslide
import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio._err import CPLE_AppDefinedError

from darefine_qupath import prediction
from darefine_qupath.devices import choose_device, choose_precision
from darefine_qupath.errors import PredictionError
from darefine_qupath.geometry import Box, Size
from darefine_qupath.models import ContextFeatures, ModelConfig, Normalization, build_model
from darefine_qupath.prediction import (
    PredictionProgress,
    PredictOptions,
    ScoreMap,
    predict_slide,
    read_score_map,
    scoremap_writer,
    stain_statistics,
)
from darefine_qupath.prediction.area import PredictionArea
from darefine_qupath.prediction.blend import MapRows, RollingBand, WindowedScores
from darefine_qupath.prediction.engine import (
    Engine,
    EngineSettings,
    choose_batch_size,
)
from darefine_qupath.prediction.journal import JournalState, PredictionJournal
from darefine_qupath.prediction.plan import ContextGroup, MapGrid, plan_slide, with_overlap
from darefine_qupath.prediction.pooling import pooled_length, pooled_window, smooth_window
from darefine_qupath.prediction.prefetch import BatchPixels, SliceBatch, cut_batches, read_ahead
from darefine_qupath.prediction.scoremap_writer import write_score_map
from darefine_qupath.prediction.slide_checks import check_slide
from darefine_qupath.prediction.slide_warnings import SlideWarning
from darefine_qupath.prediction.stain import stain_distance
from darefine_qupath.slides import TissueMask
from darefine_qupath.tiles.plan import plan_training_tiles
from darefine_qupath.tiles.spec import TileSpec
from tests.prediction_stubs import CLASSES, SPEC, ColorNetwork, array_slide, blobs, checkpoint

quick = settings(deadline=None, derandomize=True, max_examples=60)


@given(length=st.integers(1, 600))
@quick
def test_window_is_symmetric_positive_and_highest_in_the_middle(length: int) -> None:
    window = smooth_window(length)
    assert window.min() > 0
    assert window.max() <= 1
    np.testing.assert_allclose(window, window[::-1], atol=1e-6)
    assert window.argmax() in (length // 2, (length - 1) // 2)


@given(half=st.integers(2, 300))
@quick
def test_windows_half_a_slice_apart_weigh_every_pixel_alike(half: int) -> None:
    window = smooth_window(2 * half)
    both = window[:half] + window[half:]
    assert both.max() - both.min() < 1e-5


@given(length=st.integers(1, 300), stride=st.sampled_from([1, 2, 4]), data=st.data())
@quick
def test_pooling_a_window_keeps_its_sum(length: int, stride: int, data: st.DataObject) -> None:
    phase = data.draw(st.integers(0, stride - 1))
    pooled = pooled_window(length, phase, stride)
    assert len(pooled) == pooled_length(length, phase, stride)
    assert pooled.sum() * stride == pytest.approx(smooth_window(length).sum(), rel=1e-5)


@given(seed=st.integers(0, 99), cuts=st.lists(st.integers(0, 60), max_size=4))
@quick
def test_band_in_pieces_is_the_band_at_once(seed: int, cuts: list[int]) -> None:
    rng = np.random.default_rng(seed)
    ones = np.ones((9, 7), np.float32)
    places = rng.integers(-5, (60, 40), (12, 2)).tolist()
    scores = [WindowedScores(row, column, rng.random((3, 9, 7), np.float32), ones) for row, column in places]
    whole = RollingBand(3, 40)
    whole.reserve(70)
    for score in scores:
        whole.add(score)
    expected = whole.finish(60)
    pieces, layers = RollingBand(3, 40), []
    for cut in [*sorted(cuts), 60]:
        pieces.reserve(70)
        for score in [score for score in scores if score.row < cut]:
            pieces.add(score)
        scores = [score for score in scores if score.row >= cut]
        layers.append(pieces.finish(cut))
        # What a journal stores is all that the next piece needs.
        follower = RollingBand(3, 40, top=pieces.top)
        follower.unfinished = pieces.unfinished
        pieces = follower
    for name in ("label", "confidence", "margin", "runner_up"):
        np.testing.assert_array_equal(
            np.concatenate([getattr(layer, name) for layer in layers]), getattr(expected, name)
        )


def test_layers_say_best_second_and_by_how_much() -> None:
    band = RollingBand(3, 2)
    band.reserve(1)
    scores = np.array([[[0.2, 0.1]], [[0.7, 0.1]], [[0.1, 0.8]]], np.float32)
    band.add(WindowedScores(0, 0, scores[:, :, :1], np.full((1, 1), 0.5, np.float32)))
    layers = band.finish(1)
    assert layers.label.tolist() == [[1, 255]]
    assert layers.confidence.tolist() == [[round(0.7 * 255), 0]]
    assert layers.margin.tolist() == [[round(0.5 * 255), 0]]
    assert layers.runner_up.tolist() == [[0, 255]]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_no_class(value: float) -> None:
    band = RollingBand(3, 2)
    band.reserve(1)
    scores = np.full((3, 1, 2), 1 / 3, np.float32)
    scores[:, :, 1] = value
    band.add(WindowedScores(0, 0, scores, np.ones((1, 2), np.float32)))
    assert band.finish(1).label.tolist() == [[0, 255]]


def test_one_class_has_no_runner_up() -> None:
    band = RollingBand(1, 1)
    band.reserve(1)
    band.add(WindowedScores(0, 0, np.ones((1, 1, 1), np.float32), np.ones((1, 1), np.float32)))
    layers = band.finish(1)
    assert (layers.label[0, 0], layers.margin[0, 0], layers.runner_up[0, 0]) == (0, 255, 255)


SPECS = st.builds(
    lambda side, times, steps, placement, size: TileSpec(
        input_px=size, slice_px=side, context_px=side * times, stride_px=max(1, side // steps), placement=placement
    ),
    side=st.integers(20, 120),
    times=st.integers(1, 5),
    steps=st.integers(1, 4),
    placement=st.sampled_from(["parent", "centred"]),
    size=st.sampled_from([16, 20, 30]),
)


@given(spec=SPECS, width=st.integers(1, 900), height=st.integers(1, 900))
@quick
def test_plan_covers_the_slide_and_finishes_rows_in_order(spec: TileSpec, width: int, height: int) -> None:
    plan = plan_slide((width, height), spec.at(None), PredictOptions())
    covered = np.zeros((height, width), bool)
    done = 0
    for row in plan.rows:
        for group in row.groups:
            for box in group.slices:
                assert group.context.contains(box)
                assert plan.grid.place(box.y)[0] >= done
                covered[max(0, box.y) : box.bottom, max(0, box.x) : box.right] = True
        assert row.bottom >= done
        assert row.reach <= plan.grid.size.height
        done = row.bottom
    assert done == plan.grid.size.height
    assert covered.all()


def test_no_slice_border_lies_on_a_parent_border_alone() -> None:
    # Of every column of the paper's plan, more than the edges of slices must be seen.
    spec = TileSpec.paper().at(None)
    plan = plan_slide((14_000, 14_000), spec, PredictOptions())
    starts = sorted({box.x for row in plan.rows for group in row.groups for box in group.slices})
    assert set(np.diff(starts)) == {500}
    assert len({(box.x, box.y) for row in plan.rows for p in row.groups for box in p.slices}) == plan.num_slices


def test_first_context_is_planned_as_in_training() -> None:
    spec = TileSpec.paper().at(None)
    trained = plan_training_tiles((14_000, 14_000), spec)[:81]
    predicted = plan_slide((14_000, 14_000), spec, PredictOptions(context_overlap=0.0)).rows[0].groups[0]
    assert [pair.slice for pair in trained] == list(predicted.slices)
    assert {pair.context for pair in trained} == {predicted.context}


def test_slices_lie_around_the_middle_of_their_context() -> None:
    plan = plan_slide((20_000, 20_000), TileSpec.paper().at(None), PredictOptions())
    inner = [group for row in plan.rows[1:-1] for group in row.groups[1:-1]]
    assert {len(group.slices) for group in inner} == {25}
    for group in inner:
        for box in group.slices:
            assert min(box.x - group.context.x, group.context.right - box.right) >= 1000
            assert min(box.y - group.context.y, group.context.bottom - box.bottom) >= 1000


@pytest.mark.parametrize(("overlap", "stride"), [(None, 375), (0.0, 500), (0.5, 250), (0.75, 125)])
def test_overlap_sets_the_stride(overlap: float | None, stride: int) -> None:
    spec = TileSpec(input_px=500, slice_px=500, context_px=2000, stride_px=500).at(None)
    assert with_overlap(spec, overlap).stride_px == stride


def test_what_lies_between_tissue_is_finished_in_small_bands() -> None:
    def keep(boxes: list[Box]) -> np.ndarray:
        return np.array([40_000 <= box.y < 43_000 or box.y > 95_000 for box in boxes])

    plan = plan_slide((3000, 100_000), TileSpec.paper().at(None), PredictOptions(), keep=keep)
    bottoms = np.array([0, *(row.bottom for row in plan.rows)])
    assert bottoms[-1] == 12_500
    assert 0 < np.diff(bottoms).min() <= np.diff(bottoms).max() <= 625
    assert max(row.reach - bottom for row, bottom in zip(plan.rows, bottoms, strict=False)) <= 700


def test_overlap_as_trained_is_kept() -> None:
    assert with_overlap(TileSpec.paper().at(None), None) == TileSpec.paper().at(None)


@given(scale=st.floats(0.3, 9), position=st.integers(-5000, 200_000), stride=st.sampled_from([1, 2, 4]))
@quick
def test_a_place_on_the_map_is_at_most_half_an_input_pixel_off(scale: float, position: int, stride: int) -> None:
    grid = MapGrid(scale, stride, Size(1, 1))
    pixel, phase = grid.place(position)
    assert 0 <= phase < stride
    # Or less than a level-0 pixel, where that is the larger one.
    assert abs((pixel * stride + phase) * scale - position) <= (scale / 2 if scale > 1 else scale) + 1e-6


@st.composite
def asked(draw: st.DrawFn) -> tuple[TileSpec, float, PredictOptions, tuple[int, int]]:
    """Tiles in any ratio, pixel size, options and slide: large and fine ones along one axis only."""
    slice_um = draw(st.floats(1, 400))
    tiles = TileSpec(
        input_px=draw(st.integers(1, 64)),
        slice_um=slice_um,
        context_um=slice_um * draw(st.one_of(st.just(1.0), st.floats(1, 1.3), st.floats(1, 6))),
        stride_um=slice_um * draw(st.floats(0.1, 1)),
        placement=draw(st.sampled_from(["parent", "centred"])),
    )
    mpp = draw(st.floats(0.1, 3))
    options = PredictOptions(
        overlap=draw(st.one_of(st.none(), st.just(0.0), st.floats(0, 0.9))),
        context_overlap=draw(st.floats(0, 0.9)),
        output_stride=draw(st.sampled_from([1, 2, 4])),
    )
    side = tiles.at(mpp).slice_px
    lengths = st.integers(1, min(100_000, 12 * side)), st.integers(1, min(500, 3 * side))
    return tiles, mpp, options, draw(st.tuples(*draw(st.permutations(lengths))))


@given(asked())
@settings(deadline=None, derandomize=True, max_examples=200)
def test_every_map_pixel_is_reached_whatever_the_ratios(
    case: tuple[TileSpec, float, PredictOptions, tuple[int, int]],
) -> None:
    tiles, mpp, options, size = case
    plan = plan_slide(size, tiles.at(mpp), options)
    for axis in (0, 1):
        boxes = [box for row in plan.rows for group in row.groups for box in group.slices]
        places = [plan.grid.place(start) for start in sorted({box.bounds[axis] for box in boxes})]
        ends = [pixel + pooled_length(plan.spec.input_px, phase, plan.grid.stride) for pixel, phase in places]
        assert places[0] == (0, 0)
        assert ends[-1] >= plan.grid.size[axis]
        inputs = [pixel * plan.grid.stride + phase for pixel, phase in places]
        assert all(step <= plan.spec.input_px for step in np.diff(inputs))


@given(
    sizes=st.tuples(st.integers(1, 60), st.integers(0, 60), st.integers(1, 60), st.integers(1, 40)),
    slide=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    corner=st.tuples(st.floats(-5, 150), st.floats(-5, 150)),
    seed=st.integers(0, 99),
    output_stride=st.sampled_from([1, 2, 4]),
)
@quick
def test_every_map_pixel_that_is_asked_for_is_reached(
    sizes: tuple[int, int, int, int], slide: tuple[int, int], corner: tuple[float, float], seed: int, output_stride: int
) -> None:
    side, more, stride, input_px = sizes
    tiles = TileSpec(
        slice_px=side, context_px=side + more, stride_px=min(stride, side), input_px=max(input_px, side // 8)
    )
    mask = np.random.default_rng(seed).random((7, 9)) < 0.3
    region = PredictionArea(
        tissue=TissueMask(mask, Size(*slide)) if seed % 2 else None,
        within=shapely.box(*corner, corner[0] + 60, corner[1] + 30) if seed % 3 else None,
    )
    options = PredictOptions(output_stride=output_stride, overlap=0.0)
    plan = plan_slide(slide, tiles.at(None), options, keep=region.touches)
    reached = np.zeros(plan.grid.size[::-1], bool)
    for box in (box for row in plan.rows for group in row.groups for box in group.slices):
        (column, right), (row, down) = plan.grid.place(box.x), plan.grid.place(box.y)
        height, width = (pooled_length(plan.spec.input_px, phase, output_stride) for phase in (down, right))
        reached[row : row + height, column : column + width] = True
    outside = region.outside(plan.grid, 0, plan.grid.size.height)
    assert (reached | (False if outside is None else outside)).all()


def test_batches_run_over_groups_and_read_each_context_once() -> None:
    groups = [ContextGroup(Box(10 * n, 0, 10, 10), tuple(Box(10 * n + i, 0, 1, 1) for i in range(3))) for n in range(4)]
    found = list(cut_batches(groups, 5))
    assert [len(batch.slices) for batch in found] == [5, 5, 2]
    assert [batch.group_numbers for batch in found] == [(0, 0, 0, 1, 1), (1, 2, 2, 2, 3), (3, 3)]
    assert [[number for number, _ in batch.new_contexts] for batch in found] == [[0, 1], [2, 3], []]
    assert not any(batch.new_contexts for batch in cut_batches(groups, 5, contexts=False))


def test_reading_ahead_keeps_order_and_bound() -> None:
    running, most = 0, 0
    lock = threading.Lock()

    def read(batch: SliceBatch) -> BatchPixels:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.002 * (batch.group_numbers[0] % 3))
        return BatchPixels(batch, (), (), ())

    work = [SliceBatch((), (number,), ()) for number in range(40)]
    order = []
    with ThreadPoolExecutor(8) as pool:
        for pixels in read_ahead(iter(work), read, pool, ahead=5):
            order.append(pixels.batch.group_numbers[0])
            with lock:
                assert running - len(order) <= 5
    assert order == list(range(40))
    assert most > 2


def test_reading_ahead_passes_errors_on() -> None:
    def read(batch: SliceBatch) -> BatchPixels:
        raise ValueError(f"batch {batch.group_numbers[0]}")

    with ThreadPoolExecutor(2) as pool, pytest.raises(ValueError, match="batch 0"):
        list(read_ahead(iter([SliceBatch((), (number,), ()) for number in range(9)]), read, pool, ahead=3))


class Located(torch.nn.Module):
    """Gives back where the network was told each slice lies, painted into the slice's own frame."""

    def encode_context(self, context_N3HW: torch.Tensor) -> ContextFeatures:
        return ContextFeatures(maps=(context_N3HW,))

    def decode(self, slice_B3HW, context, index_B, box_B4):  # noqa: ANN001, ANN201
        from_context = []
        side = context.maps[0].shape[-1]
        for index, (left, top, right, bottom) in zip(
            index_B.tolist(), (box_B4 * side).round().int().tolist(), strict=True
        ):
            from_context.append(context.maps[0][index, :, top:bottom, left:right])
        return slice_B3HW - torch.stack(from_context)


def test_symmetries_turn_slice_context_and_place_alike() -> None:
    # If box, slice and context turn together, the slice cut from the context is the slice, in all eight.
    context = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    boxes = np.array([[4, 8, 20, 24], [20, 0, 36, 16]], np.float32)
    slices = [context[int(t) : int(b), int(left) : int(r)] for left, t, r, b in boxes]
    options = EngineSettings(device="cpu", precision="fp32", batch_size=2, tta=True, output_stride=1)
    engine = Engine(Located(), Normalization(), options)
    scored = engine.score(slices, engine.encode([context]), [0, 0], boxes / 40, [(0, 0)] * 2)
    for scores, _ in scored.fetch():
        np.testing.assert_allclose(scores, 1 / 3, atol=1e-6)


@pytest.mark.parametrize("phase", [(0, 0), (1, 3), (2, 2)])
def test_pooled_scores_are_those_of_the_mean_logits(phase: tuple[int, int]) -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (30, 30, 3), np.uint8)
    scores = []
    for stride in (1, 4):
        options = EngineSettings(device="cpu", precision="fp32", batch_size=1, output_stride=stride)
        engine = Engine(ColorNetwork(sharpness=1.0), Normalization(mean=(0, 0, 0), std=(1, 1, 1)), options)
        place = phase if stride == 4 else (0, 0)
        scored = engine.score([pixels], engine.encode([pixels]), [0], np.zeros((1, 4), np.float32), [place])
        scores.append(next(iter(scored.fetch())))
    (fine, _), (coarse, weight) = scores
    row, column = 8 - phase[0], 12 - phase[1]
    block = np.log(fine[:, row : row + 4, column : column + 4])
    expected = np.exp(block.mean((1, 2)))
    np.testing.assert_allclose(coarse[:, 2, 3], expected / expected.sum(), rtol=1e-4)
    assert coarse.shape[1:] == weight.shape
    np.testing.assert_allclose(coarse.sum(0), 1, rtol=1e-5)


def test_network_without_context_is_given_none(tmp_path: Path) -> None:
    config = ModelConfig(network="refinenet", slice_encoder="resnet18", width=8, num_classes=3)
    slide = array_slide(tmp_path, blobs((128, 128)))
    tiles = TileSpec(input_px=64, slice_px=64, context_px=128, stride_px=64)
    options = PredictOptions(tissue=False, device="cpu", precision="fp32", overlap=0.0)
    predict_slide(slide, checkpoint(build_model(config, seed=0), tiles=tiles), out=tmp_path / "map", options=options)
    assert {read.width for read in slide.reads} == {64}


@pytest.mark.parametrize(
    ("flags", "precision"), [((True, False), "bf16"), ((False, True), "bf16"), ((False, False), "fp32")]
)
def test_precision_follows_the_processor(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[bool, bool], precision: str
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: flags[0], raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: flags[1], raising=False)
    assert choose_precision("auto", torch.device("cpu")) == precision
    assert choose_precision("fp32", torch.device("cpu")) == "fp32"
    assert choose_precision("auto", torch.device("cpu"), training=True) == "fp32"


def test_batches_are_smaller_for_larger_slices() -> None:
    cpu = torch.device("cpu")
    assert [choose_batch_size(cpu, size) for size in (2000, 500, 256, 128)] == [2, 2, 8, 32]
    assert choose_batch_size(torch.device("meta"), 500) == 32
    assert choose_device("auto").type in ("cpu", "cuda", "mps")


def state(**changes: object) -> JournalState:
    values = {"fingerprint": "f", "settings": EngineSettings(device="cpu", precision="fp32", batch_size=2)} | changes
    return JournalState(**values)  # type: ignore[arg-type]


def test_journal_gives_back_what_was_committed(tmp_path: Path) -> None:
    journal = PredictionJournal(tmp_path / "partial")
    journal.start(state())
    band, carry = MapRows.blank(3, 5), np.arange(30, dtype=np.float32).reshape(3, 2, 5)
    warning = SlideWarning(kind="unreadable", message="m", value=1.0, boxes=(Box(1, 2, 3, 4),))
    committed = state(rows_done=1, slices_done=7, class_pixels=(1, 2), warnings=(warning,))
    journal.commit(committed, band, carry)
    again = PredictionJournal(tmp_path / "partial")
    assert again.load("f", bottoms=[3, 9], width=5) == committed
    np.testing.assert_array_equal(again.unfinished(0), carry)
    np.testing.assert_array_equal(next(again.bands(1)).label, band.label)
    assert again.load("another", bottoms=[3, 9], width=5) is None
    # A plan of other rows or another width is another prediction, whatever the journal says.
    assert again.load("f", bottoms=[4, 9], width=5) is None
    assert again.load("f", bottoms=[3, 9], width=6) is None
    assert again.load("f", bottoms=[], width=5) is None


@pytest.mark.parametrize("name", ["band-00000.npz", "unfinished-00000.npz"])
@pytest.mark.parametrize("damage", [None, b"", b"PK nonsense"], ids=["missing", "empty", "garbage"])
def test_a_journal_whose_arrays_are_damaged_starts_over(
    tmp_path: Path, name: str, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    journal = PredictionJournal(tmp_path / "partial")
    journal.start(state())
    journal.commit(state(rows_done=1, class_pixels=(1, 2)), MapRows.blank(3, 5), np.zeros((3, 2, 5), np.float32))
    assert journal.load("f", bottoms=[3], width=5) is not None
    path = tmp_path / "partial" / name
    path.unlink() if damage is None else path.write_bytes(damage)
    assert journal.load("f", bottoms=[3], width=5) is None
    assert f"{name} is damaged" in caplog.text
    assert "starting over" in caplog.text


@pytest.mark.parametrize("text", ["", "{", "[]", '"', '{"fingerprint": "f"}', '{"format": "x", "settings": {}}'])
def test_damaged_journal_starts_over(tmp_path: Path, text: str) -> None:
    journal = PredictionJournal(tmp_path / "partial")
    journal.start(state())
    (tmp_path / "partial" / "journal.json").write_text(text)
    assert journal.load("f", bottoms=[3], width=5) is None


def test_damaged_band_is_named(tmp_path: Path) -> None:
    journal = PredictionJournal(tmp_path / "partial")
    journal.start(state())
    (tmp_path / "partial" / "band-00000.npz").write_bytes(b"PK nonsense")
    with pytest.raises(PredictionError, match=r"band-00000\.npz is damaged"):
        next(journal.bands(1))


def a_map(folder: Path, size: tuple[int, int] = (700, 900)) -> ScoreMap:
    return ScoreMap(
        folder=folder,
        size=Size(*size),
        box=Box(0, 0, size[0] * 8, size[1] * 8),
        downsample=8.0,
        mpp=0.25,
        classes=CLASSES,
        model_id="m",
        fingerprint="f",
        class_pixels=(100, 300, 0),
        num_slices=3,
    )


def some_bands(size: tuple[int, int], heights: list[int]) -> list[MapRows]:
    rng = np.random.default_rng(0)
    layers = []
    for height in heights:
        label = blobs((size[0], height), seed=height)
        label[:, :50] = 255
        shape = (height, size[0])
        confidence, margin = (rng.integers(0, 255, shape, np.uint8) for _ in range(2))
        layers.append(MapRows(label, confidence, margin, np.full(shape, 2, np.uint8)))
    return layers


@pytest.mark.parametrize("heights", [[900], [1, 511, 300, 88], [512, 388], [100] * 9])
def test_bands_of_any_height_make_the_same_files(tmp_path: Path, heights: list[int]) -> None:
    whole = some_bands((700, 900), [900])[0]
    starts = np.cumsum([0, *heights])
    pieces = [
        MapRows(
            *(plane[start : start + height] for plane in (whole.label, whole.confidence, whole.margin, whole.runner_up))
        )
        for start, height in zip(starts, heights, strict=False)
    ]
    found = a_map(tmp_path)
    write_score_map(found, pieces)
    np.testing.assert_array_equal(found.read("class"), whole.label)
    np.testing.assert_array_equal(found.read("margin", Box(10, 20, 30, 40)), whole.margin[20:60, 10:40])
    rows = [(row, band["confidence"]) for row, band in found.bands(300)]
    assert [row for row, _ in rows] == [0, 300, 600]
    np.testing.assert_array_equal(np.concatenate([band for _, band in rows]), whole.confidence)


def test_openslide_opens_the_pyramid_in_class_colours(tmp_path: Path) -> None:
    found = a_map(tmp_path)
    band = some_bands((700, 900), [900])[0]
    write_score_map(found, [band])
    with openslide.OpenSlide(str(found.path("class"))) as slide:
        assert slide.level_dimensions[0] == (700, 900)
        assert slide.level_count == 3
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(2.0)
        pixels = np.asarray(slide.read_region((0, 0), 0, (700, 900)))[..., :3]
    for label, color in enumerate(CLASSES.colors):
        assert (pixels[band.label == label] == color).all()
    with openslide.OpenSlide(str(found.path("confidence"))) as slide:
        gray = np.asarray(slide.read_region((0, 0), 0, (700, 900)))[..., 0]
    np.testing.assert_array_equal(gray, band.confidence)


def test_map_without_all_rows_is_not_finished(tmp_path: Path) -> None:
    with pytest.raises(PredictionError, match="888 rows were given for a score map of 900"):
        write_score_map(a_map(tmp_path), some_bands((700, 888), [888]))
    with pytest.raises(PredictionError, match="No finished score map"):
        read_score_map(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"format": "darefine-score-map/9"}, "has format 'darefine-score-map/9', expected"),
        ({"size": None}, "is damaged"),
        ({"size": [70, 90]}, r"70 map pixels of 8\.0 are not 5600 level-0 pixels"),
        ({"downsample": 0}, "700 map pixels of 0.0 are not"),
        ({"mpp": "x"}, "is damaged"),
        ({"settings": None}, "is damaged"),
        ({"class_pixels": [1]}, "counts 1 classes of 3"),
        ({"bytes": [1]}, "is damaged"),
        ({"classes": {}}, "is damaged"),
    ],
)
def test_damaged_sidecar_is_refused(tmp_path: Path, damage: dict[str, object], message: str) -> None:
    write_score_map(a_map(tmp_path), some_bands((700, 900), [900]))
    path = tmp_path / "scoremap.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    with pytest.raises(PredictionError, match=message):
        read_score_map(tmp_path)


def test_truncated_layer_is_named(tmp_path: Path) -> None:
    write_score_map(a_map(tmp_path), some_bands((700, 900), [900]))
    path = tmp_path / "confidence.tif"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(
        PredictionError, match=rf"confidence\.tif is damaged .{len(whole) - 1} bytes instead of {len(whole)}"
    ):
        read_score_map(tmp_path)


@pytest.mark.parametrize("name", ["scoremap.json", "class.tif"])
def test_what_cannot_be_replaced_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(PredictionError, match=f"Cannot .*{tmp_path.name}"):
        write_score_map(a_map(tmp_path), some_bands((700, 900), [900]))
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "error", [CPLE_AppDefinedError(3, 1, "TIFFReadDirectory: Failed"), OSError(28, "No space left")]
)
def test_a_disk_that_fills_up_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fill(*_: object) -> None:
        raise error

    monkeypatch.setattr(scoremap_writer, "_add_pyramid", fill)
    with pytest.raises(PredictionError, match=rf"Cannot write the score map to .*{tmp_path.name}: .*(Failed|No space)"):
        write_score_map(a_map(tmp_path), some_bands((700, 900), [900]))
    assert not list(tmp_path.iterdir())


def test_a_map_without_all_rows_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(PredictionError, match="1 rows were given"):
        write_score_map(a_map(tmp_path), some_bands((700, 1), [1]))
    assert not list(tmp_path.iterdir())


def test_a_sidecar_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "scoremap.json").mkdir()
    with pytest.raises(PredictionError, match=r"scoremap\.json cannot be read"):
        read_score_map(tmp_path)


def test_missing_layer_is_named(tmp_path: Path) -> None:
    write_score_map(a_map(tmp_path), some_bands((700, 900), [900]))
    (tmp_path / "margin.tif").unlink()
    with pytest.raises(PredictionError, match="lacks the layers"):
        read_score_map(tmp_path)


def test_window_outside_the_map_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PredictionError, match="not inside the score map"):
        a_map(tmp_path).read("class", Box(600, 0, 200, 10))


def test_areas_and_shares(tmp_path: Path) -> None:
    found = a_map(tmp_path)
    assert found.areas_mm2() == pytest.approx({"A": 0.0004, "B": 0.0012, "C": 0.0})
    assert found.shares() == {"A": 0.25, "B": 0.75, "C": 0.0}


def tissue(mean: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(mean, 20, (64, 64, 3))
    return noise.clip(0, 255).astype(np.uint8)


def test_stain_statistics_leave_glass_out() -> None:
    stained = tissue((190, 110, 170))
    glass = np.full((64, 64, 3), 240, np.uint8)
    alone, with_glass = stain_statistics([stained]), stain_statistics([stained, glass])
    assert alone == with_glass
    assert alone is not None
    assert alone.num_pixels > 4000
    assert alone.mean[1] > alone.mean[2] > alone.mean[0]
    assert stain_statistics([glass]) is None
    assert prediction.StainStatistics.from_json(alone.to_json()) == alone
    assert stain_distance(alone, alone) == 0


def warnings_for(tmp_path: Path, *, mpp: float | None = 0.5, **provenance: object) -> dict[str, SlideWarning]:
    slide = array_slide(tmp_path, blobs((300, 300)))
    slide.pixels = np.tile(tissue((190, 110, 170)), (5, 5, 1))[:300, :300]
    plan = plan_slide(slide.size, SPEC.at(None), PredictOptions())
    physical = TileSpec(input_px=32, slice_um=16, context_um=64, stride_um=8)
    found = check_slide(slide, plan, tiles=physical, mpp=mpp, provenance=provenance)
    return {warning.kind: warning for warning in found}


def test_usual_slide_gives_no_warning(tmp_path: Path) -> None:
    stain = stain_statistics([tissue((190, 110, 170), seed=3)])
    assert stain is not None
    assert not warnings_for(tmp_path, stain=stain.to_json())
    assert not warnings_for(tmp_path)


def test_other_stain_and_other_pixel_size_are_told_with_numbers(tmp_path: Path) -> None:
    stain = stain_statistics([tissue((120, 160, 220))])
    assert stain is not None
    found = warnings_for(tmp_path, stain=stain.to_json())
    assert found["stain"].value > 1
    assert f"{found['stain'].value:.2f} standard deviations" in found["stain"].message
    assert warnings_for(tmp_path, mpp=0.8)["mpp"].value == pytest.approx(1.6)
    assert not warnings_for(tmp_path, mpp=None)


@pytest.mark.parametrize(("trained", "ratio"), [(0.25, 2.0), ([0.25, 1.0], 2.0), ([0.45], None), (1.0, 0.5)])
def test_pixel_size_is_compared_with_the_nearest_of_training(
    tmp_path: Path, trained: float | list[float], ratio: float | None
) -> None:
    slide = array_slide(tmp_path, blobs((200, 200)))
    plan = plan_slide(slide.size, SPEC.at(None), PredictOptions())
    found = check_slide(slide, plan, tiles=SPEC, mpp=0.5, provenance={"mpp": trained})
    assert [warning.value for warning in found] == ([] if ratio is None else [pytest.approx(ratio)])


def test_unreadable_places_are_found_before_work_starts(tmp_path: Path) -> None:
    slide = array_slide(tmp_path, blobs((300, 300)), damage=(Box(0, 0, 300, 120),))
    plan = plan_slide(slide.size, SPEC.at(None), PredictOptions())
    (found,) = check_slide(slide, plan, tiles=SPEC, mpp=None, provenance={})
    assert found.kind == "unreadable"
    assert 0.2 < found.value < 0.7
    options = PredictOptions(tissue=False, device="cpu", strict=True)
    with pytest.raises(PredictionError, match="sampled places cannot be read"):
        predict_slide(slide, checkpoint(ColorNetwork()), out=tmp_path / "map", options=options)


def test_progress_before_the_first_slice_knows_no_time_left() -> None:
    assert PredictionProgress("s", 0, 10, 0.0, 0).seconds_left is None
    assert PredictionProgress("s", 6, 10, 2.0, 4).seconds_left == 2.0


def test_names_that_others_rely_on() -> None:
    assert set(prediction.__all__) == {
        "PredictOptions", "PredictionProgress", "ScoreMap", "SlideResult", "SlideTask", "SlideWarning",
        "StainStatistics", "predict_many", "predict_slide", "read_score_map", "stain_statistics",
    }  # fmt: skip
    assert len(prediction.__all__) <= 12
