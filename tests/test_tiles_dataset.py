"""Datasets: what is found, what is written, resumed, read again, and refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
import shapely
import tifffile
import torch
from PIL import Image
from torch.utils.data import DataLoader

from darefine_qupath.annotations import Annotation, Plane
from darefine_qupath.classes import IGNORE, ClassMap, Color
from darefine_qupath.errors import MissingMppError, SlideError, SlideNotFoundError, TileError
from darefine_qupath.geometry import Box
from darefine_qupath.masks import LabelPainter
from darefine_qupath.tiles.build import build_dataset
from darefine_qupath.tiles.dataset import DatasetReader, dataset_digest, load_index
from darefine_qupath.tiles.index import TileIndex, case_of
from darefine_qupath.tiles.plan import plan_training_tiles
from darefine_qupath.tiles.reading import read_context
from darefine_qupath.tiles.scan import TileFilter, index_tiles
from darefine_qupath.tiles.slide_reader import SlideTileReader
from darefine_qupath.tiles.sources import TileSource, open_source
from darefine_qupath.tiles.spec import TileSpec
from darefine_qupath.tiles.storage import PixelFolder, Storage, encode_mask, palette
from darefine_qupath.training.tile_dataset import TileDataset
from tests.tile_slides import ArraySlide, ramps, read_pair, write_pyramid

CLASSES = ClassMap(names=("A", "B"), colors=(Color(1, 2, 3), Color(250, 20, 30)))
SPEC = TileSpec(input_px=32, slice_px=64, context_px=192, stride_px=32)
LOSSLESS = Storage(pixels="webp")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[TileSource, ...]:
    """Two slides of one size; on the first a square of A with a smaller one of B in it, on the second B alone."""
    folder = tmp_path_factory.mktemp("slides")
    path = write_pyramid(folder / "one.tif", ramps(500, 400), (2, 4))
    shutil.copy(path, folder / "two.tif")
    first = (
        Annotation(geometry=shapely.box(40, 40, 300, 300), path_class="A"),
        Annotation(geometry=shapely.box(100, 100, 164, 164), path_class="B"),
    )
    second = (Annotation(geometry=shapely.Point(250, 200).buffer(90), path_class="B"),)
    return (
        TileSource(id="1", name="one", path=path, annotations=first, metadata={"Case ID": "c1"}),
        TileSource(id="2", name="two", path=folder / "two.tif", annotations=second, mpp=0.25),
    )


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def same(one: TileIndex, other: TileIndex) -> bool:
    columns = ("image", "slice_xy", "context_xy", "counts")
    return (one.spec, one.classes, one.images) == (other.spec, other.classes, other.images) and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in columns
    )


def test_counts_are_those_of_the_masks(sources: tuple[TileSource, ...]) -> None:
    index = index_tiles(sources, SPEC, CLASSES)
    for record in index:
        source = sources[0] if record.image.id == "1" else sources[1]
        mask = LabelPainter(source.annotations, CLASSES).paint(record.pair.slice, (32, 32), image_size=(500, 400))
        assert record.counts == ((mask == 0).sum(), (mask == 1).sum())
        assert record.ignored == (mask == IGNORE).sum()
    assert index.class_pixels.tolist() == [sum(r.counts[0] for r in index), sum(r.counts[1] for r in index)]
    assert index.class_tiles[1] == sum(r.counts[1] > 0 for r in index)
    assert (1 - index.counts[:, -1] / index.counts.sum(axis=1)).min() >= 0.01


def test_tiles_side_by_side_count_every_labelled_pixel_once(sources: tuple[TileSource, ...]) -> None:
    spec = TileSpec(input_px=50, slice_px=50, context_px=150, stride_px=50)
    index = index_tiles(sources[:1], spec, CLASSES, tile_filter=TileFilter(min_labelled=0))
    assert index.class_pixels.tolist() == [260 * 260 - 64 * 64, 64 * 64]


def test_a_record_names_its_image_and_place(sources: tuple[TileSource, ...]) -> None:
    index = index_tiles(sources, SPEC, CLASSES)
    record = index[0]
    assert record.id == f"1/{record.pair.slice.x}_{record.pair.slice.y}"
    assert [found.id for found in index] == index.ids()
    assert len(set(index.ids())) == len(index)
    assert (record.image.name, record.image.size, record.image.mpp) == ("one", (500, 400), pytest.approx(0.5))
    assert [image.group for image in index.images] == [("case", "c1"), ("image", "2")]


def test_a_subset_keeps_order_and_images(sources: tuple[TileSource, ...]) -> None:
    index = index_tiles(sources, SPEC, CLASSES)
    chosen = index.subset([3, 1])
    assert chosen.ids() == [index.ids()[3], index.ids()[1]]
    assert chosen.images == index.images
    assert index.subset(index.counts[:, 1] > 0).class_tiles[1] == index.class_tiles[1]


def test_columns_that_do_not_fit_are_refused(sources: tuple[TileSource, ...]) -> None:
    index = index_tiles(sources, SPEC, CLASSES)
    with pytest.raises(TileError, match="columns of a tile index do not fit"):
        replace(index, counts=index.counts[:, :-1])
    with pytest.raises(TileError, match=r"Several images have the id \['1'\]"):
        replace(index, images=(index.images[0], index.images[0]))


@pytest.mark.parametrize(
    ("metadata", "case"),
    [
        ({"Case ID": " 7 "}, "7"),
        ({"patient_id": "P"}, "P"),
        ({"subject": "s", "case": "c"}, "c"),
        ({"Case": "", "Patient": "p"}, "p"),
        ({"scanner": "x"}, None),
    ],
    ids=str,
)
def test_a_case_is_found_under_its_usual_names(metadata: dict[str, str], case: str | None) -> None:
    assert case_of(metadata) == case


def test_only_tiles_with_enough_labels_stay(sources: tuple[TileSource, ...]) -> None:
    every = index_tiles(sources, SPEC, CLASSES, tile_filter=TileFilter(min_labelled=0))
    half = index_tiles(sources, SPEC, CLASSES, tile_filter=TileFilter(min_labelled=0.5))
    assert same(half, every.subset(every.counts[:, :-1].sum(axis=1) >= 0.5 * every.counts.sum(axis=1)))
    assert 0 < len(half) < len(every)


def half_glass(_: TileSource) -> ArraySlide:
    pixels = np.full((400, 600, 3), 245, np.uint8)
    pixels[:, 300:] = np.random.default_rng(0).integers((150, 40, 110), (210, 90, 170), (400, 300, 3))
    return ArraySlide(pixels, mpp=None)


def test_glass_is_left_out_unless_it_is_annotated() -> None:
    classes = ClassMap(names=("A", "B"), unlabelled="A")
    note = Annotation(geometry=shapely.box(10, 10, 30, 30), path_class="B")
    source = TileSource(id="1", name="one", path=Path("x"), annotations=(note,))
    index = index_tiles([source], SPEC, classes, opener=half_glass)
    on_glass = {tuple(xy) for xy in index.slice_xy.tolist() if xy[0] + 64 < 280}
    assert on_glass == {(0, 0)}
    assert {xy[0] for xy in index.slice_xy.tolist()} >= {320, 384, 416}
    every = index_tiles([source], SPEC, classes, opener=half_glass, tile_filter=TileFilter(min_tissue=0))
    assert len(every) > len(index)
    assert every.counts[:, -1].max() < 32 * 32


@pytest.mark.parametrize("name", ["min_labelled", "min_tissue"])
def test_a_share_lies_between_0_and_1(name: str) -> None:
    with pytest.raises(TileError, match=f"{name} is a share between 0 and 1, got 1.5"):
        TileFilter(**{name: 1.5})


def test_nothing_labelled_is_an_error_that_says_so(sources: tuple[TileSource, ...]) -> None:
    bare = replace(sources[0], annotations=())
    with pytest.raises(TileError, match=r"None of 0 tiles on 1 images holds enough labelled pixels; annotate areas"):
        index_tiles([bare], SPEC, CLASSES)


def test_what_is_left_out_is_said_once(sources: tuple[TileSource, ...], caplog: pytest.LogCaptureFixture) -> None:
    line = Annotation(geometry=shapely.LineString([(0, 0), (9, 9)]), path_class="B")
    other = Annotation(geometry=shapely.box(0, 0, 9, 9), path_class="B", plane=Plane(z=1))
    only_a = replace(sources[0], annotations=(sources[0].annotations[0], line, other))
    index_tiles([only_a, replace(sources[1], annotations=())], SPEC, CLASSES)
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "1 of 2 images give no tiles: two",
        "No tile holds a pixel of B",
    ]


def test_two_sources_of_one_id_are_refused(sources: tuple[TileSource, ...]) -> None:
    with pytest.raises(TileError, match=r"Several images have the id \['1'\]"):
        index_tiles([sources[0], sources[0]], SPEC, CLASSES)


def test_an_image_without_pixel_size_is_named(tmp_path: Path, sources: tuple[TileSource, ...]) -> None:
    path = write_pyramid(tmp_path / "bare.tif", ramps(64, 64), mpp=None)
    spec = TileSpec(slice_um=32, context_um=96, stride_um=16)
    with pytest.raises(MissingMppError, match="one: The tiles are 32 um wide"):
        index_tiles([replace(sources[0], path=path)], spec, CLASSES)


def test_progress_ends_at_the_number_of_planned_tiles(sources: tuple[TileSource, ...]) -> None:
    calls: list[tuple[int, int]] = []
    index = index_tiles(sources, SPEC, CLASSES, progress=lambda *call: calls.append(call))
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1] >= len(index)


def test_the_folder_holds_every_tile_and_each_context_once(sources: tuple[TileSource, ...], tmp_path: Path) -> None:
    index = build_dataset(sources, SPEC, CLASSES, tmp_path, storage=LOSSLESS)
    assert same(index, index_tiles(sources, SPEC, CLASSES))
    assert same(load_index(tmp_path), index)
    for number, image_id in enumerate(("1", "2")):
        folder, mine = tmp_path / "images" / image_id, index.image == number
        names = {kind: {path.stem for path in (folder / kind).iterdir()} for kind in ("slice", "mask", "context")}
        assert names["slice"] == names["mask"] == {f"{x}_{y}" for x, y in index.slice_xy[mine].tolist()}
        assert names["context"] == {f"{x}_{y}" for x, y in index.context_xy[mine].tolist()}
        assert len(names["context"]) < len(names["slice"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset.json", "images", "tiles.jsonl"]


def test_pixels_are_what_prediction_reads_at_the_same_place(sources: tuple[TileSource, ...], tmp_path: Path) -> None:
    index = build_dataset(sources, SPEC, CLASSES, tmp_path, storage=LOSSLESS)
    stored, fresh = DatasetReader(tmp_path), SlideTileReader(sources, CLASSES)
    for image, source in zip(index.images, sources, strict=True):
        with open_source(source) as slide:
            planned = {pair.slice: pair for pair in plan_training_tiles(slide.size, SPEC.at(image.mpp))}
            for record in (record for record in index if record.image == image):
                pixels = read_pair(slide, planned[record.pair.slice], record.spec)
                for found in (stored.read(record), fresh.read(record)):
                    assert (found.slice == pixels.slice).all()
                    assert (found.context == pixels.context).all()
                assert (stored.read(record).mask == fresh.read(record).mask).all()
    fresh.close()


def test_jpeg_is_near_and_says_so(sources: tuple[TileSource, ...], tmp_path: Path) -> None:
    index = build_dataset(sources, SPEC, CLASSES, tmp_path)
    assert json.loads((tmp_path / "dataset.json").read_text())["storage"] == {"pixels": "jpeg", "quality": 95}
    with SlideTileReader(sources, CLASSES) as fresh:
        for record in index:
            stored, pixels = DatasetReader(tmp_path).read(record), fresh.read(record)
            assert np.abs(stored.slice.astype(int) - pixels.slice).mean() < 2
            assert (stored.mask == pixels.mask).all()


def test_masks_show_in_class_colours(tmp_path: Path) -> None:
    mask = np.array([[0, 1], [1, IGNORE]], np.uint8)
    (tmp_path / "mask.png").write_bytes(encode_mask(mask, palette(CLASSES)))
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == "P"
        assert (np.array(image) == mask).all()
        shown = np.array(image.convert("RGB"))
    assert shown.tolist() == [[[1, 2, 3], [250, 20, 30]], [[250, 20, 30], [255, 255, 255]]]


def test_the_same_input_gives_the_same_bytes(sources: tuple[TileSource, ...], tmp_path: Path) -> None:
    build_dataset(sources, SPEC, CLASSES, tmp_path / "a")
    build_dataset(sources, SPEC, CLASSES, tmp_path / "b", workers=2)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert dataset_digest(tmp_path / "a") == dataset_digest(tmp_path / "b")


class Killed(BaseException):
    pass


@pytest.fixture
def kill_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[str]]:
    """Let a build die while it writes its n-th slice, half written; or count the slices it writes."""
    written: list[str] = []
    limit = [10**9]
    real = PixelFolder.write

    def write(self: PixelFolder, image_id: str, kind: str, box: Box, pixels: np.ndarray) -> bytes:
        if kind == "slice":
            written.append(f"{image_id}/{box.x}_{box.y}")
            if len(written) > limit[0]:
                self.path(image_id, "slice", box).write_bytes(b"half a file")
                raise Killed
        return real(self, image_id, kind, box, pixels)  # type: ignore[arg-type]

    def arm(number: int) -> list[str]:
        limit[0] = number
        written.clear()
        return written

    monkeypatch.setattr(PixelFolder, "write", write)
    return arm


@pytest.mark.parametrize("after", [0, 1, 30, 75])
def test_a_killed_build_goes_on_and_ends_with_the_same_bytes(
    sources: tuple[TileSource, ...], tmp_path: Path, kill_after: Callable[[int], list[str]], after: int
) -> None:
    written = kill_after(10**9)
    index = build_dataset(sources, SPEC, CLASSES, tmp_path / "whole")
    number = len(written)
    kill_after(after)
    with pytest.raises(Killed):
        build_dataset(sources, SPEC, CLASSES, tmp_path / "killed")
    with pytest.raises(TileError, match="holds no finished dataset"):
        load_index(tmp_path / "killed")
    kill_after(10**9)
    assert same(build_dataset(sources, SPEC, CLASSES, tmp_path / "killed"), index)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert after == 0 or len(written) <= number
    assert after < 30 or len(written) < number


def test_a_torn_line_of_the_journal_is_done_again(
    sources: tuple[TileSource, ...], tmp_path: Path, kill_after: Callable[[int], list[str]]
) -> None:
    build_dataset(sources, SPEC, CLASSES, tmp_path / "whole")
    kill_after(75)
    with pytest.raises(Killed):
        build_dataset(sources, SPEC, CLASSES, tmp_path / "killed")
    journal = tmp_path / "killed" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    kill_after(10**9)
    build_dataset(sources, SPEC, CLASSES, tmp_path / "killed")
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.parametrize("junk", [b"", b"junk", b"junk\n", b"{}\n"], ids=repr)
def test_a_journal_that_is_none_is_begun_anew(sources: tuple[TileSource, ...], tmp_path: Path, junk: bytes) -> None:
    (tmp_path / "journal.jsonl").write_bytes(junk)
    if junk == b"{}\n":
        with pytest.raises(TileError, match="holds a dataset of other slides"):
            build_dataset(sources, SPEC, CLASSES, tmp_path)
    else:
        assert len(build_dataset(sources, SPEC, CLASSES, tmp_path)) > 0


def test_a_finished_dataset_is_not_built_again(
    sources: tuple[TileSource, ...], tmp_path: Path, kill_after: Callable[[int], list[str]]
) -> None:
    index = build_dataset(sources, SPEC, CLASSES, tmp_path)
    kill_after(0)
    assert same(build_dataset(sources, SPEC, CLASSES, tmp_path), index)


@pytest.mark.parametrize(
    "change",
    [
        lambda s, c: (s, replace(c, unlabelled="A")),
        lambda s, c: (s[:1], c),
        lambda s, c: ([replace(s[0], annotations=s[0].annotations[:1]), s[1]], c),
        lambda s, c: ([replace(s[0], annotations=(replace(s[0].annotations[0], path_class="B"),)), s[1]], c),
        lambda s, c: ([replace(s[0], mpp=0.3), s[1]], c),
    ],
    ids=["classes", "images", "annotations", "class", "mpp"],
)
def test_a_dataset_of_other_input_is_kept_unless_told(
    sources: tuple[TileSource, ...], tmp_path: Path, change: Callable[..., tuple[list[TileSource], ClassMap]]
) -> None:
    build_dataset(sources, SPEC, CLASSES, tmp_path / "here", storage=LOSSLESS)
    former = files(tmp_path / "here")
    others, classes = change(list(sources), CLASSES)
    with pytest.raises(TileError, match="holds a dataset of other slides, annotations or settings; overwrite it"):
        build_dataset(others, SPEC, classes, tmp_path / "here", storage=LOSSLESS)
    assert files(tmp_path / "here") == former
    build_dataset(others, SPEC, classes, tmp_path / "here", storage=LOSSLESS, overwrite=True)
    build_dataset(others, SPEC, classes, tmp_path / "new", storage=LOSSLESS)
    assert files(tmp_path / "here") == files(tmp_path / "new")


def test_what_is_not_a_mask_does_not_matter(sources: tuple[TileSource, ...], tmp_path: Path) -> None:
    build_dataset(sources, SPEC, CLASSES, tmp_path / "a")
    renamed = tuple(replace(note, id=uuid4(), name="x", locked=True) for note in sources[0].annotations)
    again = build_dataset([replace(sources[0], annotations=renamed), sources[1]], SPEC, CLASSES, tmp_path / "b")
    assert len(again) > 0
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_an_id_cannot_leave_the_folder(sources: tuple[TileSource, ...], tmp_path: Path) -> None:
    odd = replace(sources[0], id="../a/b:c")
    index = build_dataset([odd], SPEC, CLASSES, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert DatasetReader(tmp_path / "out").read(index[0]).slice.shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "dataset.json").write_text("{"), "dataset.json is damaged"),
        (lambda f: (f / "dataset.json").write_text("[]"), "dataset.json is damaged"),
        (lambda f: (f / "dataset.json").unlink(), "holds no finished dataset; build it"),
        (lambda f: rewrite(f / "dataset.json", version=99), "is 'darefine-tiles' version 99, not"),
        (lambda f: rewrite(f / "dataset.json", format="other"), "is 'other' version 1"),
        (lambda f: rewrite(f / "dataset.json", images=[]), "is damaged; build it again: "),
        (lambda f: (f / "tiles.jsonl").unlink(), "is damaged; build it again: "),
        (lambda f: (f / "tiles.jsonl").write_text('{"image": "1"}\n'), "is damaged; build it again: "),
        (lambda f: drop_line(f / "tiles.jsonl"), r"has \d+ of \d+ tiles"),
    ],
    ids=["json", "list", "missing", "version", "format", "images", "no tiles", "tile", "short"],
)
def test_a_damaged_dataset_is_refused(
    sources: tuple[TileSource, ...], tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    build_dataset(sources[:1], SPEC, CLASSES, tmp_path)
    damage(tmp_path)
    with pytest.raises(TileError, match=message):
        load_index(tmp_path)


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def drop_line(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


@pytest.mark.parametrize(("suffix", "storage"), [(".jpg", Storage()), (".webp", LOSSLESS), (".png", LOSSLESS)])
def test_a_damaged_tile_is_named(
    sources: tuple[TileSource, ...], tmp_path: Path, suffix: str, storage: Storage
) -> None:
    index = build_dataset(sources[:1], SPEC, CLASSES, tmp_path, storage=storage)
    assert list(tmp_path.rglob(f"*{suffix}"))
    for path in tmp_path.rglob(f"*{suffix}"):
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(TileError, match=f"Tile {index[0].id} cannot be read"):
        DatasetReader(tmp_path).read(index[0])


def test_a_folder_that_cannot_be_written_is_named(sources: tuple[TileSource, ...], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TileError, match=r"Cannot write the dataset .*free space or give another folder"):
        build_dataset(sources, SPEC, CLASSES, tmp_path / "file" / "out")


def test_a_missing_slide_is_not_a_full_disk(sources: tuple[TileSource, ...], tmp_path: Path) -> None:
    with pytest.raises(SlideNotFoundError):
        build_dataset([replace(sources[0], path=tmp_path / "no.tif")], SPEC, CLASSES, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"), [({"pixels": "gif"}, "not 'gif'"), ({"quality": 0}, "between 1 and 100, got 0")]
)
def test_storage_is_checked(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(TileError, match=message):
        Storage(**arguments)  # type: ignore[arg-type]


def test_workers_find_what_one_process_finds(sources: tuple[TileSource, ...]) -> None:
    assert same(index_tiles(sources, SPEC, CLASSES, workers=2), index_tiles(sources, SPEC, CLASSES))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_slide_is_named(sources: tuple[TileSource, ...], tmp_path: Path, workers: int) -> None:
    path = tmp_path / "damaged.tif"
    shutil.copy(sources[0].path, path)
    with tifffile.TiffFile(path) as tiff:
        tiles = [tile for page in tiff.pages for tile in zip(page.dataoffsets, page.databytecounts, strict=True)]
    data = bytearray(path.read_bytes())
    for offset, length in tiles:
        data[offset : offset + length] = b"\xff" * length
    path.write_bytes(data)
    with pytest.raises(SlideError, match=r"damaged\.tif: the box .* cannot be read"):
        build_dataset([replace(sources[0], path=path)], SPEC, CLASSES, tmp_path / "out", workers=workers)


SPOT = Box(210, 60, 10, 10)


class SpottySlide(ArraySlide):
    """A slide that cannot be read at one spot."""

    def read(self, box: Box, size: tuple[int, int]) -> np.ndarray:
        if box.intersection(SPOT) is not None:
            raise SlideError(f"the box {box.x}, {box.y} cannot be read")
        return super().read(box, size)


def test_tiles_on_a_damaged_spot_are_left_out_and_counted(
    sources: tuple[TileSource, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = index_tiles(sources[:1], SPEC, CLASSES)
    index = build_dataset(
        sources[:1], SPEC, CLASSES, tmp_path, storage=LOSSLESS, opener=lambda _: SpottySlide(ramps(500, 400))
    )
    expected = [record.id for record in whole if record.pair.slice.intersection(SPOT) is None]
    assert 0 < len(expected) < len(whole)
    assert index.ids() == expected
    assert f"{len(whole) - len(expected)} tiles cannot be read and are left out; the first: the box" in caplog.text
    assert "1 contexts are white where the slide is damaged; the first: array: 2 pieces" in caplog.text
    assert same(load_index(tmp_path), index)
    # Of the context only the pieces on the spot are lost.
    around = next(record for record in index if record.pair.context.intersection(SPOT) is not None)
    box, side = around.pair.context, around.spec.context_input_px
    rows, columns = (np.indices((side, side)) + 0.5) * box.width / side
    piece = box.width / 8
    near = (abs(columns + box.x - 215) < 5 + piece) & (abs(rows + box.y - 65) < 5 + piece)
    context = DatasetReader(tmp_path).read(around).context
    undamaged, _ = read_context(ArraySlide(ramps(500, 400)), box, around.spec)
    assert (context[(abs(columns + box.x - 215) < 5) & (abs(rows + box.y - 65) < 5)] == 255).all()
    np.testing.assert_array_equal(context[~near], undamaged[~near])


def test_slides_read_on_the_fly_lose_to_damage_what_stored_tiles_lose(
    sources: tuple[TileSource, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def opener(_: TileSource) -> SpottySlide:
        return SpottySlide(ramps(500, 400))

    whole = index_tiles(sources[:1], SPEC, CLASSES)
    stored = build_dataset(sources[:1], SPEC, CLASSES, tmp_path, opener=opener, storage=LOSSLESS)
    from_disk, kept = DatasetReader(tmp_path), {record.id for record in stored}
    with SlideTileReader(sources[:1], CLASSES, opener=opener) as reader:
        for record in [*whole, *whole]:
            found = reader.read(record)
            if record.id in kept:
                for ours, theirs in zip(found, from_disk.read(record), strict=True):
                    np.testing.assert_array_equal(ours, theirs)
            else:
                assert (found.mask == IGNORE).all()
                assert (found.slice == 255).all()
    lost = [message for message in caplog.messages if "cannot be read and gives no labels" in message]
    assert len(lost) == len(whole) - len(stored) > 0
    assert sum("pieces of the context at x 192, y 0 cannot be read" in message for message in caplog.messages) == 2


def test_a_slide_repaired_to_the_same_size_is_cut_again(
    sources: tuple[TileSource, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slide, out = tmp_path / "slide.tif", tmp_path / "out"
    shutil.copy(sources[0].path, slide)
    source = replace(sources[0], path=slide)
    spotty = build_dataset([source], SPEC, CLASSES, out, opener=lambda _: SpottySlide(ramps(500, 400)))
    assert same(build_dataset([source], SPEC, CLASSES, out), spotty)
    digest, later = dataset_digest(out), slide.stat().st_mtime_ns + 10**9
    os.utime(slide, ns=(later, later))
    # A dataset that several runs share is not taken from under them.
    assert same(build_dataset([source], SPEC, CLASSES, out), spotty)
    assert "was cut before the slides of 1 were written the last time" in caplog.text
    repaired = build_dataset([source], SPEC, CLASSES, out, overwrite=True)
    assert len(repaired) > len(spotty)
    assert dataset_digest(out) != digest


def test_a_copy_of_a_slide_gives_a_dataset_of_the_same_digest(sources: tuple[TileSource, ...], tmp_path: Path) -> None:
    build_dataset(sources[:1], SPEC, CLASSES, tmp_path / "one")
    copy = tmp_path / sources[0].path.name
    shutil.copyfile(sources[0].path, copy)
    os.utime(copy, (1, 1))
    build_dataset([replace(sources[0], path=copy)], SPEC, CLASSES, tmp_path / "two")
    assert dataset_digest(tmp_path / "one") == dataset_digest(tmp_path / "two")


def test_a_reader_shares_contexts_and_closes_its_slides(sources: tuple[TileSource, ...]) -> None:
    opened: list[ArraySlide] = []

    def opener(_: TileSource) -> ArraySlide:
        opened.append(ArraySlide(ramps(500, 400)))
        return opened[-1]

    index = index_tiles(sources[:1], SPEC, CLASSES, opener=opener)
    reader = SlideTileReader(sources, CLASSES, opener=opener)
    opened.clear()
    for record in index:
        reader.read(record)
    contexts = [box for box, _ in opened[0].reads if box.width == 192]
    assert len(opened) == 1
    assert len(contexts) == len(set(contexts)) < len(index)
    reader.close()
    assert opened[0].is_closed


def test_a_reader_keeps_few_slides_open(sources: tuple[TileSource, ...]) -> None:
    opened: dict[str, ArraySlide] = {}
    many = [replace(sources[0], id=str(number)) for number in range(12)]
    reader = SlideTileReader(many, CLASSES, opener=lambda s: opened.setdefault(s.id, ArraySlide(ramps(64, 64))))
    for source in many:
        reader.open(source.id)
    assert [slide.is_closed for slide in opened.values()] == [True] * 4 + [False] * 8
    with pytest.raises(TileError, match="No image '99' among the sources"):
        reader.open("99")


def test_a_reader_pickles_without_its_handles(sources: tuple[TileSource, ...]) -> None:
    index = index_tiles(sources, SPEC, CLASSES)
    with SlideTileReader(sources, CLASSES) as reader:
        before = reader.read(index[0])
        with pickle.loads(pickle.dumps(reader)) as copy:
            assert all((a == b).all() for a, b in zip(before, copy.read(index[0]), strict=True))


def test_a_forked_process_opens_its_own_slides(
    sources: tuple[TileSource, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with SlideTileReader(sources, CLASSES) as reader:
        mine, _ = reader.open("1")
        monkeypatch.setattr("os.getpid", lambda: -5)
        other, _ = reader.open("1")
        assert other is not mine
        mine.close()


@pytest.mark.parametrize("from_disk", [True, False], ids=["disk", "slides"])
def test_tensors_and_batches(sources: tuple[TileSource, ...], tmp_path: Path, from_disk: bool) -> None:
    if from_disk:
        index = build_dataset(sources, SPEC, CLASSES, tmp_path, storage=LOSSLESS)
    else:
        index = index_tiles(sources, SPEC, CLASSES)
    reader = DatasetReader(tmp_path) if from_disk else SlideTileReader(sources, CLASSES)
    dataset = TileDataset(index, reader)
    batch = next(iter(DataLoader(dataset, batch_size=4)))
    assert (batch.slice.shape, batch.context.shape, batch.mask.shape) == ((4, 3, 32, 32), (4, 3, 32, 32), (4, 32, 32))
    assert {batch.slice.dtype, batch.context.dtype, batch.mask.dtype} == {torch.uint8}
    assert list(batch.id) == index.ids()[:4]
    assert len(dataset) == len(index)
    copy = pickle.loads(pickle.dumps(dataset))
    assert (copy[2].slice == batch.slice[2]).all()
    expected = reader.read(index[2])
    assert (batch.slice[2].permute(1, 2, 0).numpy() == expected.slice).all()
    assert (batch.mask[2].numpy() == expected.mask).all()


def test_what_a_transform_writes_stays_in_its_tile(sources: tuple[TileSource, ...]) -> None:
    dataset = TileDataset(index_tiles(sources, SPEC, CLASSES), SlideTileReader(sources, CLASSES))
    before = dataset[1].context.clone()
    dataset[0].context.zero_()
    assert (dataset[1].context == before).all()


def test_building_needs_no_torch() -> None:
    modules = "darefine_qupath.tiles.dataset, darefine_qupath.report.contact_sheet"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
