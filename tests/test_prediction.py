"""From slide to score map: what is predicted where, what is not, and what survives a kill."""

# B N slices and contexts, H W pixels
# ruff: noqa: N803

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from shapely.geometry import Point, box

from darefine_qupath.errors import DeviceError, MissingMppError, PredictionError
from darefine_qupath.geometry import Box, Size
from darefine_qupath.models import ContextFeatures, ModelConfig, Normalization, build_model
from darefine_qupath.prediction import PredictionProgress, PredictOptions, predict_slide, read_score_map
from darefine_qupath.prediction import fingerprint as prediction_fingerprint
from darefine_qupath.prediction import slide as prediction_slide
from darefine_qupath.prediction.fingerprint import compute_fingerprint
from darefine_qupath.prediction.plan import SlidePlan
from darefine_qupath.slides import TissueMask
from darefine_qupath.tiles.spec import TileSpec
from tests.prediction_stubs import COLORS, SPEC, ArraySlide, ColorNetwork, array_slide, blobs, checkpoint

OPTIONS = PredictOptions(tissue=False, workers=2, batch_size=8, device="cpu", precision="fp32", output_stride=1)
KILLS = int(os.environ.get("DAREFINE_KILLS", "6"))
"""How often the run is killed that must end with the bytes of one that never was."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def truth_on_map(labels: np.ndarray, downsample: int) -> np.ndarray:
    """Labels at the map's pixels where a whole pixel has one label, 255 elsewhere."""
    height, width = (side // downsample for side in labels.shape)
    blocks = labels[: height * downsample, : width * downsample].reshape(height, downsample, width, downsample)
    low, high = blocks.min((1, 3)), blocks.max((1, 3))
    return np.where(low == high, low, np.uint8(255))


@pytest.mark.parametrize("placement", ["parent", "centred"])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_every_pixel_has_its_own_label(tmp_path: Path, placement: str, stride: int) -> None:
    labels = blobs((700, 530))
    slide = array_slide(tmp_path, labels)
    tiles = TileSpec(input_px=32, slice_px=64, context_px=256, stride_px=32, placement=placement)
    options = PredictOptions(tissue=False, device="cpu", precision="fp32", output_stride=stride)
    found = predict_slide(slide, checkpoint(ColorNetwork(), tiles=tiles), out=tmp_path / "map", options=options)
    truth = truth_on_map(labels, 2 * stride)
    known = truth != 255
    predicted = found.read("class")[: truth.shape[0], : truth.shape[1]]
    assert found.size == Size(-(-700 // (2 * stride)), -(-530 // (2 * stride)))
    assert known.mean() > 0.5
    assert np.array_equal(predicted[known], truth[known])
    assert (found.read("class") != 255).all()


@pytest.mark.parametrize(
    ("context", "stride", "overlap"), [(77, 32, None), (80, 64, None), (96, 64, 0.0), (64, 64, 0.0)]
)
@pytest.mark.parametrize("size", [(700, 530), (1, 1), (65, 3), (331, 67)])
def test_no_pixel_is_skipped_whatever_the_context(
    tmp_path: Path, context: int, stride: int, overlap: float | None, size: tuple[int, int]
) -> None:
    labels = blobs(size)
    tiles = TileSpec(input_px=27, slice_px=64, context_px=context, stride_px=stride)
    options = PredictOptions(tissue=False, device="cpu", precision="fp32", output_stride=1, overlap=overlap)
    found = predict_slide(
        array_slide(tmp_path, labels), checkpoint(ColorNetwork(), tiles=tiles), out=tmp_path / "map", options=options
    )
    assert (found.read("class") != 255).all()
    assert sum(found.class_pixels) == found.size.width * found.size.height


def test_a_constant_slide_has_constant_scores(tmp_path: Path) -> None:
    slide = array_slide(tmp_path, np.ones((500, 610), np.uint8))
    found = predict_slide(slide, checkpoint(ColorNetwork(sharpness=1.0)), out=tmp_path / "map", options=OPTIONS)
    inner = Box(0, 0, 305, 250)
    for layer in ("class", "confidence", "margin", "runner_up"):
        assert len(np.unique(found.read(layer, inner))) == 1


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.75])
def test_error_near_tile_borders_is_that_of_everywhere(tmp_path: Path, overlap: float) -> None:
    # A network that errs at the edge of its slices, as real ones do.
    class Edgy(ColorNetwork):
        def decode(self, slice_B3HW, context, index_B=None, box_B4=None):  # noqa: ANN001, ANN202
            logits = super().decode(slice_B3HW, context, index_B, box_B4)
            side = torch.linspace(-1, 1, slice_B3HW.shape[-1])
            edge = torch.maximum(side.abs()[:, None], side.abs()[None])
            noise = torch.rand(logits.shape, generator=torch.Generator().manual_seed(len(logits)))
            return logits + 20 * (edge > 0.9) * noise

    labels = np.zeros((800, 800), np.uint8)
    options = PredictOptions(tissue=False, device="cpu", output_stride=1, overlap=overlap, precision="fp32", workers=1)
    network = Edgy(sharpness=8.0)
    found = predict_slide(array_slide(tmp_path, labels), checkpoint(network), out=tmp_path / "map", options=options)
    wrong = found.read("class")[32:-64, 32:-64] != 0
    assert wrong.any() == (overlap == 0.0)


def test_sharing_contexts_changes_no_score(tmp_path: Path) -> None:
    slide = array_slide(tmp_path, blobs((640, 500)))
    maps, contexts = [], []
    for share in (True, False):
        network = ColorNetwork(trust=3.0, sharpness=2.0)
        options = PredictOptions(tissue=False, device="cpu", precision="fp32", share_context=share)
        maps.append(predict_slide(slide, checkpoint(network), out=tmp_path / str(share), options=options))
        contexts.append((network.num_contexts, network.num_slices))
    assert contexts[0][1] == contexts[1][1] == contexts[1][0]
    assert contexts[0][0] * 10 < contexts[1][0]
    for layer in ("class", "confidence", "margin", "runner_up"):
        assert np.array_equal(maps[0].read(layer), maps[1].read(layer))


@pytest.mark.parametrize("fusion", ["attention", "add", "aligned"])
def test_real_network_scores_alike_with_and_without_sharing(tmp_path: Path, fusion: str) -> None:
    config = ModelConfig(
        slice_encoder="resnet18", context_encoder="resnet18", width=8, num_classes=3, fusion=fusion, dropout=0
    )
    tiles = TileSpec(input_px=64, slice_px=64, context_px=192, stride_px=64)
    slide = array_slide(tmp_path, blobs((192, 320)))
    maps = []
    for share in (True, False):
        model = checkpoint(build_model(config, seed=1), tiles=tiles)
        options = PredictOptions(tissue=False, device="cpu", precision="fp32", share_context=share)
        maps.append(predict_slide(slide, model, out=tmp_path / str(share), options=options))
    difference = maps[0].read("confidence").astype(int) - maps[1].read("confidence")
    assert np.abs(difference).max() <= 1
    assert (maps[0].read("class") == maps[1].read("class")).mean() > 0.999


def test_contexts_are_read_once(tmp_path: Path) -> None:
    slide = array_slide(tmp_path, blobs((900, 900)))
    network = ColorNetwork()
    predict_slide(slide, checkpoint(network), out=tmp_path / "map", options=OPTIONS)
    contexts = [read for read in slide.reads if read.width == 256]
    assert len(contexts) == len(set(contexts)) == network.num_contexts < network.num_slices / 10


def test_only_inside_an_area(tmp_path: Path) -> None:
    slide = array_slide(tmp_path, blobs((600, 400)))
    circle = Point(300, 200).buffer(90)
    network = ColorNetwork()
    options = PredictOptions(tissue=False, device="cpu", within=circle, output_stride=1)
    found = predict_slide(slide, checkpoint(network), out=tmp_path / "map", options=options)
    predicted = found.read("class") != 255
    assert predicted.sum() * 4 == pytest.approx(circle.area, rel=0.01)
    assert network.num_slices < 100
    assert sum(found.class_pixels) == predicted.sum()
    assert not found.read("confidence")[~predicted].any()


def test_glass_is_not_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.zeros((20, 30), bool)
    mask[5:12, 3:20] = True
    monkeypatch.setattr("darefine_qupath.prediction.slide.tissue_mask", lambda slide, **_: TissueMask(mask, slide.size))
    slide = array_slide(tmp_path, blobs((600, 400)))
    options = PredictOptions(device="cpu", output_stride=1)
    found = predict_slide(slide, checkpoint(ColorNetwork()), out=tmp_path / "map", options=options)
    assert np.array_equal(found.read("class") != 255, mask.repeat(10, 0).repeat(10, 1))


def test_slide_without_tissue_ends_with_an_empty_map(tmp_path: Path) -> None:
    slide = array_slide(tmp_path, blobs((300, 300)))
    options = PredictOptions(tissue=False, device="cpu", within=box(5000, 5000, 5100, 5100))
    found = predict_slide(slide, checkpoint(ColorNetwork()), out=tmp_path / "map", options=options)
    assert (found.read("class") == 255).all()
    assert [warning.kind for warning in found.warnings] == ["no tissue"]
    with pytest.raises(PredictionError, match="no tissue was found; leave out --strict"):
        predict_slide(
            slide, checkpoint(ColorNetwork()), out=tmp_path / "strict",
            options=PredictOptions(tissue=False, device="cpu", within=options.within, strict=True),
        )  # fmt: skip


def test_damaged_region_is_reported_and_never_labelled(tmp_path: Path) -> None:
    hole = Box(300, 260, 40, 30)
    slide = array_slide(tmp_path, blobs((700, 600)), damage=(hole,))
    found = predict_slide(slide, checkpoint(ColorNetwork()), out=tmp_path / "map", options=OPTIONS)
    missing = found.read("class") == 255
    rows, columns = np.nonzero(missing)
    assert missing[130:145, 150:170].all()
    # Nothing further away than a slice is lost.
    assert rows.min() * 2 > 260 - 64
    assert rows.max() * 2 < 290 + 64
    assert columns.min() * 2 > 300 - 64
    assert columns.max() * 2 < 340 + 64
    assert found.unreadable
    assert all(unread.intersection(hole) for unread in found.unreadable)
    assert {warning.kind for warning in found.warnings} == {"unreadable", "context"}
    assert sum(found.class_pixels) == (~missing).sum()


def test_tissue_that_was_skipped_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prediction_slide.plan_slide

    def lacking(*arguments: object, **more: object) -> SlidePlan:
        plan = whole(*arguments, **more)  # type: ignore[arg-type]
        return replace(plan, rows=(replace(plan.rows[0], groups=()), *plan.rows[1:]))

    monkeypatch.setattr(prediction_slide, "plan_slide", lacking)
    slide = array_slide(tmp_path, blobs((600, 400)))
    run = partial(predict_slide, slide, checkpoint(ColorNetwork()), out=tmp_path / "map")
    found = run(options=OPTIONS)
    missing = (found.read("class") == 255).mean()
    assert missing > 0.05
    assert found.unpredicted_share == missing
    assert [(warning.kind, warning.value) for warning in found.warnings] == [("unpredicted", missing)]
    assert f"{100 * missing:.1f} % of the tissue asked for has no label" in found.warnings[0].message
    assert read_score_map(tmp_path / "map") == found
    with pytest.raises(PredictionError, match=r"asked for has no label.*leave out --strict"):
        run(options=replace(OPTIONS, strict=True, resume=False))


def test_slices_that_cannot_be_read_are_told_with_their_share(tmp_path: Path) -> None:
    slide = array_slide(tmp_path, blobs((700, 600)), damage=(Box(300, 260, 40, 30),))
    found = predict_slide(slide, checkpoint(ColorNetwork()), out=tmp_path / "map", options=OPTIONS)
    share = f"{100 * found.unpredicted_share:.1f} %"
    (told,) = [warning.message for warning in found.warnings if warning.kind == "unreadable" and warning.boxes]
    assert told.endswith(f"were not predicted: {share} of the tissue asked for has no label")


@pytest.mark.parametrize("finished", [False, True])
def test_damage_is_an_error_when_strict(tmp_path: Path, finished: bool) -> None:
    slide = array_slide(tmp_path, blobs((700, 600)), damage=(Box(300, 260, 40, 30),))
    run = partial(predict_slide, slide, checkpoint(ColorNetwork()), out=tmp_path / "map")
    if finished:
        run(options=OPTIONS)
    with pytest.raises(PredictionError, match=r"cannot be read.*leave out --strict"):
        run(options=replace(OPTIONS, strict=True))


def test_finished_slide_is_not_predicted_again_until_something_changes(tmp_path: Path) -> None:
    slide = array_slide(tmp_path, blobs((300, 300)))
    network = ColorNetwork()
    model = checkpoint(network)

    def run(**changes: object) -> bool:
        before = network.num_slices
        options = PredictOptions(tissue=False, device="cpu", **changes)  # type: ignore[arg-type]
        predict_slide(slide, model, out=tmp_path / "map", options=options)
        return network.num_slices > before

    assert run()
    assert not run()
    assert not run(workers=3, batch_size=2)
    assert run(overlap=0.6)
    assert run(overlap=0.6, resume=False)
    slide.path.write_bytes(b"another slide")
    assert run(overlap=0.6)
    model.model_id = "another model"
    assert run(overlap=0.6)
    assert not (tmp_path / "map" / "partial").exists()


def test_a_fingerprint_is_of_all_that_changes_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marks = []

    def note(slide: ArraySlide, *, mpp: float = 0.5, **options: object) -> None:
        marks.append(compute_fingerprint(slide, model, mpp=mpp, options=PredictOptions(**options)))  # type: ignore[arg-type]

    model = checkpoint(ColorNetwork())
    slide = array_slide(tmp_path, blobs((30, 30)))
    note(slide)
    for changes in (
        {"overlap": 0.6}, {"context_overlap": 0.1}, {"tta": True}, {"tissue": False}, {"output_stride": 1},
        {"precision": "fp32"}, {"crop_bounds": False}, {"within": box(0, 0, 9, 9)}, {"mpp": 0.25},
    ):  # fmt: skip
        note(slide, **changes)  # type: ignore[arg-type]
    slide.reader = "pillow"  # type: ignore[attr-defined]
    note(slide)
    monkeypatch.setattr(prediction_fingerprint, "__version__", "9")
    note(slide)
    # Another slide of the same name, size, length and time.
    (tmp_path / "b").mkdir()
    twin = array_slide(tmp_path / "b", blobs((30, 30)))
    twin.path.write_bytes(b"other")
    os.utime(twin.path, ns=(0, slide.path.stat().st_mtime_ns))
    twin.reader = "pillow"  # type: ignore[attr-defined]
    note(twin)
    assert len(set(marks)) == len(marks)
    model.model_id = "another"
    note(slide)
    assert len(set(marks)) == len(marks)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_runs_go_on_and_give_the_same_bytes(tmp_path: Path) -> None:
    outputs = []
    (tmp_path / "slide.bin").touch()
    moments = np.random.default_rng(KILLS).uniform(0.1, 1, KILLS)
    for name, kills in (("whole", []), ("killed", [f"{moment:.3f}" for moment in moments])):
        folder = tmp_path / name
        folder.mkdir()
        # The image's path and time are part of the fingerprint, so both runs need the same.
        (folder / "slide.bin").symlink_to(tmp_path / "slide.bin")
        command = [sys.executable, "-m", "tests.prediction_stubs", str(folder), *kills]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        outputs.append({file.name: file.read_bytes() for file in (folder / "map").iterdir() if file.is_file()})
    assert int(done.stdout) >= 3, "the run ended before it was killed often enough"
    assert outputs[0] == outputs[1]
    assert set(outputs[0]) == {"class.tif", "confidence.tif", "margin.tif", "runner_up.tif", "scoremap.json", ".lock"}


def test_interrupted_run_repeats_no_finished_row(tmp_path: Path) -> None:
    slide = array_slide(tmp_path, blobs((600, 900)))
    network = ColorNetwork()

    def stop(progress: PredictionProgress) -> None:
        if progress.done > progress.total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_slide(slide, checkpoint(network), out=tmp_path / "map", options=OPTIONS, progress=stop)
    before, seen = network.num_slices, []
    predict_slide(slide, checkpoint(network), out=tmp_path / "map", options=OPTIONS, progress=seen.append)
    total = seen[-1].total
    assert seen[-1].done == total
    assert seen[0].done - seen[0].fresh > 0
    assert network.num_slices - before == total - (seen[0].done - seen[0].fresh)


@pytest.mark.parametrize("name", ["band-00000.npz", "journal.json"])
def test_damage_to_what_an_interrupted_run_left_is_computed_again(tmp_path: Path, name: str) -> None:
    slide = array_slide(tmp_path, blobs((400, 900)))
    whole = predict_slide(slide, checkpoint(ColorNetwork()), out=tmp_path / "whole", options=OPTIONS)

    def stop(progress: PredictionProgress) -> None:
        if progress.done > progress.total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_slide(slide, checkpoint(ColorNetwork()), out=tmp_path / "map", options=OPTIONS, progress=stop)
    damaged = tmp_path / "map" / "partial" / name
    damaged.write_bytes(damaged.read_bytes()[:-40])
    again = predict_slide(slide, checkpoint(ColorNetwork()), out=tmp_path / "map", options=OPTIONS)
    for layer in ("class", "confidence"):
        assert again.path(layer).read_bytes() == whole.path(layer).read_bytes()


def test_a_finished_map_that_was_cut_off_is_predicted_again(tmp_path: Path) -> None:
    slide = array_slide(tmp_path, blobs((300, 300)))
    found = predict_slide(slide, checkpoint(ColorNetwork()), out=tmp_path / "map", options=OPTIONS)
    whole = found.path("class").read_bytes()
    found.path("class").write_bytes(whole[: len(whole) // 2])
    predict_slide(slide, checkpoint(ColorNetwork()), out=tmp_path / "map", options=OPTIONS)
    assert found.path("class").read_bytes() == whole


def test_a_folder_that_cannot_be_locked_is_named(tmp_path: Path) -> None:
    (tmp_path / "map" / ".lock").mkdir(parents=True)
    slide = array_slide(tmp_path, blobs((300, 300)))
    with pytest.raises(PredictionError, match=f"Cannot write to {tmp_path / 'map'}"):
        predict_slide(slide, checkpoint(ColorNetwork()), out=tmp_path / "map", options=OPTIONS)


def test_two_processes_do_not_write_to_one_folder(tmp_path: Path) -> None:
    slide = array_slide(tmp_path, blobs((300, 300)))

    def inner(_: PredictionProgress) -> None:
        predict_slide(slide, checkpoint(ColorNetwork()), out=tmp_path / "map", options=OPTIONS)

    with pytest.raises(PredictionError, match="Another process is predicting into"):
        predict_slide(slide, checkpoint(ColorNetwork()), out=tmp_path / "map", options=OPTIONS, progress=inner)


def test_progress_counts_every_slice(tmp_path: Path) -> None:
    seen: list[PredictionProgress] = []
    slide = array_slide(tmp_path, blobs((300, 400)))
    found = predict_slide(slide, checkpoint(ColorNetwork()), out=tmp_path / "m", options=OPTIONS, progress=seen.append)
    assert [event.done for event in seen] == sorted({event.done for event in seen})
    assert seen[-1].done == seen[-1].total == found.num_slices
    assert seen[-1].seconds_left == 0
    assert seen[-1].rate > 0


def test_symmetries_average_out_a_lopsided_network(tmp_path: Path) -> None:
    class Lopsided(ColorNetwork):
        def decode(self, slice_B3HW, context, index_B=None, box_B4=None):  # noqa: ANN001, ANN202
            tilt = (
                torch.linspace(-1, 1, slice_B3HW.shape[-1])[None, None, None, :]
                * torch.tensor([1.0, 0, 0])[:, None, None]
            )
            return super().decode(slice_B3HW, context, index_B, box_B4) + tilt

    slide = array_slide(tmp_path, np.zeros((256, 256), np.uint8))
    spread = []
    for tta in (False, True):
        options = PredictOptions(tissue=False, device="cpu", precision="fp32", overlap=0.0, tta=tta, output_stride=1)
        model = checkpoint(Lopsided(sharpness=1.0))
        found = predict_slide(slide, model, out=tmp_path / str(tta), options=options)
        confidence = found.read("confidence").astype(float)
        spread.append(np.abs(confidence - confidence[::-1, ::-1]).max())
    assert spread[0] > 20
    assert spread[1] <= 1


def test_out_of_memory_halves_the_batch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Hungry(ColorNetwork):
        def decode(self, slice_B3HW, context, index_B=None, box_B4=None):  # noqa: ANN001, ANN202
            if len(slice_B3HW) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().decode(slice_B3HW, context, index_B, box_B4)

    labels = blobs((300, 300))
    slide = array_slide(tmp_path, labels)
    found = predict_slide(slide, checkpoint(Hungry()), out=tmp_path / "map", options=OPTIONS)
    plain = predict_slide(slide, checkpoint(ColorNetwork()), out=tmp_path / "plain", options=OPTIONS)
    assert np.array_equal(found.read("class"), plain.read("class"))
    assert found.settings["batch_size"] == 2
    assert "going on with 2 slices at once" in caplog.text


def test_a_slice_that_never_fits_is_an_error(tmp_path: Path) -> None:
    class Starving(ColorNetwork):
        def decode(self, *_: object) -> torch.Tensor:  # type: ignore[override]
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(PredictionError, match="One slice does not fit in the memory of cpu"):
        predict_slide(
            array_slide(tmp_path, blobs((99, 99))), checkpoint(Starving()), out=tmp_path / "m", options=OPTIONS
        )


class Overflowing(ColorNetwork):
    """Holds numbers that float16 cannot, where it sees the second colour."""

    def __init__(self, *, in_context: bool = False) -> None:
        super().__init__()
        self.in_context = in_context
        self.loud = torch.nn.Conv2d(3, 3, 1, bias=False)
        self.loud.weight.data = 6e4 * torch.eye(3)[:, :, None, None]

    def _loudly(self, image_B3HW: torch.Tensor) -> torch.Tensor:
        return self.loud(4 * image_B3HW) / 2.4e5

    def encode_context(self, context_N3HW: torch.Tensor) -> ContextFeatures:
        return super().encode_context(self._loudly(context_N3HW) if self.in_context else context_N3HW)

    def decode(self, slice_B3HW, context, index_B=None, box_B4=None):  # noqa: ANN001, ANN201
        seen = slice_B3HW if self.in_context else self._loudly(slice_B3HW)
        return super().decode(seen, context, index_B, box_B4) + 0 * context.of_slices(len(seen), index_B).pooled[0]


@pytest.mark.parametrize("in_context", [False, True])
@pytest.mark.parametrize("tta", [False, True])
def test_what_overflows_in_16_bits_is_computed_again_in_32(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, in_context: bool, tta: bool
) -> None:
    slide = array_slide(tmp_path, blobs((300, 200)))
    plain = predict_slide(slide, checkpoint(ColorNetwork()), out=tmp_path / "plain", options=OPTIONS)
    model = checkpoint(ColorNetwork())
    model.build = lambda: Overflowing(in_context=in_context)
    options = replace(OPTIONS, precision="fp16", tta=tta)
    found = predict_slide(slide, model, out=tmp_path / "map", options=options)
    assert "are not finite; computing their batch again in float32" in caplog.text
    assert (found.read("class") == plain.read("class")).mean() > 0.99


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_no_numbers_are_an_error_that_says_where(tmp_path: Path, value: float) -> None:
    class Faulty(ColorNetwork):
        def decode(self, slice_B3HW, context, index_B=None, box_B4=None):  # noqa: ANN001, ANN202
            logits = super().decode(slice_B3HW, context, index_B, box_B4)
            logits[:, 1][slice_B3HW[:, 1] < 0.1] = value
            return logits

    labels = np.ones((300, 300), np.uint8)
    slide = array_slide(tmp_path, labels)
    slide.pixels[200, 100] = 0
    at = r"0123456789ab gives scores .*slide\.bin at Box\(x=\d+, y=1[4-9]\d, width=64, height=64\)"
    for options in (OPTIONS, replace(OPTIONS, tta=True, output_stride=4)):
        tiles = replace(SPEC, input_px=64)
        with pytest.raises(PredictionError, match=at):
            predict_slide(slide, checkpoint(Faulty(), tiles=tiles), out=tmp_path / "map", options=options)
    assert not (tmp_path / "map" / "scoremap.json").exists()


def test_other_errors_of_the_network_are_not_swallowed(tmp_path: Path) -> None:
    class Broken(ColorNetwork):
        def decode(self, *_: object) -> torch.Tensor:  # type: ignore[override]
            raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        predict_slide(array_slide(tmp_path, blobs((99, 99))), checkpoint(Broken()), out=tmp_path / "m", options=OPTIONS)


def test_bfloat16_labels_like_float32(tmp_path: Path) -> None:
    config = ModelConfig(slice_encoder="resnet18", context_encoder="resnet18", width=8, num_classes=3, dropout=0)
    slide = array_slide(tmp_path, blobs((128, 128)))
    maps = []
    for precision in ("fp32", "bf16"):
        model = checkpoint(
            build_model(config, seed=1), tiles=TileSpec(input_px=64, slice_px=64, context_px=128, stride_px=32)
        )
        model.normalization = Normalization()
        options = PredictOptions(tissue=False, device="cpu", precision=precision)  # type: ignore[arg-type]
        maps.append(predict_slide(slide, model, out=tmp_path / precision, options=options).read("confidence"))
    assert np.abs(maps[0].astype(int) - maps[1]).max() < 13


def test_unknown_pixel_size_is_refused_in_micrometres_only(tmp_path: Path) -> None:
    slide = array_slide(tmp_path, blobs((200, 200)), mpp=None)
    physical = TileSpec(input_px=32, slice_um=32, context_um=128, stride_um=16)
    with pytest.raises(MissingMppError, match="--mpp"):
        predict_slide(slide, checkpoint(ColorNetwork(), tiles=physical), out=tmp_path / "a", options=OPTIONS)
    found = predict_slide(
        slide, checkpoint(ColorNetwork(), tiles=physical), out=tmp_path / "a", mpp=0.5, options=OPTIONS
    )
    assert found.areas_mm2() == pytest.approx(dict(zip("ABC", (n * 1e-6 for n in found.class_pixels), strict=True)))
    assert predict_slide(slide, checkpoint(ColorNetwork()), out=tmp_path / "b", options=OPTIONS).areas_mm2() is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "int8"}, "precision is 'int8'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"overlap": 1.0}, "overlap is 1.0"),
        ({"context_overlap": -0.5}, "context_overlap is -0.5"),
        ({"output_stride": 3}, "output_stride is 3"),
        ({"within": Point(0, 0).buffer(0)}, "empty or not a valid geometry"),
    ],
)
def test_options_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(PredictionError, match=message):
        PredictOptions(**settings)  # type: ignore[arg-type]


def test_unusable_device_is_named(tmp_path: Path) -> None:
    options = PredictOptions(tissue=False, device="abacus")
    with pytest.raises(DeviceError, match="Device 'abacus' cannot be used"):
        predict_slide(
            array_slide(tmp_path, blobs((99, 99))), checkpoint(ColorNetwork()), out=tmp_path / "m", options=options
        )


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PredictionError, match="Cannot make the folder"):
        predict_slide(
            array_slide(tmp_path, blobs((99, 99))),
            checkpoint(ColorNetwork()),
            out=tmp_path / "file" / "map",
            options=OPTIONS,
        )


@pytest.mark.parametrize("context_overlap", [0.0, 0.45, 0.8])
def test_every_slice_is_predicted_once_whatever_the_contexts(tmp_path: Path, context_overlap: float) -> None:
    labels = blobs((600, 500))
    network = ColorNetwork()
    options = PredictOptions(tissue=False, device="cpu", output_stride=1, context_overlap=context_overlap)
    found = predict_slide(array_slide(tmp_path, labels), checkpoint(network), out=tmp_path / "map", options=options)
    assert network.num_slices == found.num_slices == 18 * 15
    truth = truth_on_map(labels, 2)
    assert np.array_equal(found.read("class")[truth != 255], truth[truth != 255])


def test_score_map_reads_back_as_it_was_given(tmp_path: Path) -> None:
    slide = array_slide(tmp_path, blobs((300, 300)))
    found = predict_slide(slide, checkpoint(ColorNetwork()), out=tmp_path / "map", options=OPTIONS)
    assert read_score_map(tmp_path / "map") == found
    assert found.downsample == SPEC.at(None).slice_downsample
    assert len(COLORS) == found.classes.num_classes
