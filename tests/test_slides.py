"""Reading slides: the right pixels at every downsample, place and reader, and a clear word where there are none."""

from __future__ import annotations

import math
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from rasterio.enums import Resampling

from darefine_qupath.errors import (
    GeometryError,
    MissingMppError,
    SlideError,
    SlideFormatError,
    SlideNotFoundError,
)
from darefine_qupath.geometry import Box, FloatBox, PixelSize, Size, level_box, level_scale, level_window
from darefine_qupath.slides import (
    PyramidSlide,
    TissueMask,
    open_slide,
    openslide_reader,
    pillow_reader,
    resolve_mpp,
    tissue_mask,
)
from darefine_qupath.slides.pixel_size import is_plausible_pixel_size
from tests.tile_slides import area_means


def ramp(width: int, height: int) -> NDArray[np.uint8]:
    """Pixels that tell their place: red is x, green is y, both as a triangle wave of slope 1."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([wave(x), wave(y), np.full_like(x, 100)], axis=2).astype(np.uint8)


def wave(place: NDArray[Any]) -> NDArray[Any]:
    return 20 + np.abs(np.mod(place, 400) - 200)


def block_means(pixels: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """Level as scanners make it: means of whole blocks, the remainder cut off."""
    height, width = pixels.shape[0] // factor, pixels.shape[1] // factor
    blocks = pixels[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    return np.floor(blocks.mean(axis=(1, 3)) + 0.5).astype(np.uint8)


def write_pyramid(path: Path, levels: Sequence[NDArray[np.uint8]], **options: object) -> Path:
    with tifffile.TiffWriter(path) as writer:
        for index, level in enumerate(levels):
            writer.write(level, tile=(64, 64), photometric="rgb", subfiletype=int(index > 0), **options)
    return path


def write_jpeg_pyramid(path: Path, pixels: NDArray[np.uint8], factors: Sequence[int] = (2, 4)) -> Path:
    height, width = pixels.shape[:2]
    options = {"driver": "GTiff", "count": 3, "dtype": "uint8", "width": width, "height": height, "tiled": True}
    options |= {"compress": "JPEG", "photometric": "YCBCR", "blockxsize": 256, "blockysize": 256, "JPEG_QUALITY": 90}
    with rasterio.open(path, "w", **options) as dataset:
        dataset.write(pixels.transpose(2, 0, 1))
    with rasterio.Env(COMPRESS_OVERVIEW="JPEG", PHOTOMETRIC_OVERVIEW="YCBCR"), rasterio.open(path, "r+") as dataset:
        dataset.build_overviews(list(factors), Resampling.average)
    return path


def assert_in_place(slide: PyramidSlide, box: Box, size: tuple[int, int], offset: tuple[int, int] = (0, 0)) -> int:
    """Check every pixel of a read that lies well inside or well outside; return how many were inside."""
    pixels = slide.read(box, size)
    assert pixels.shape == (size[1], size[0], 3)
    steps = (box.width / size[0], box.height / size[1])
    centers = [
        start + (np.arange(count) + 0.5) * step - 0.5
        for start, count, step in zip((box.x, box.y), size, steps, strict=True)
    ]
    margins = [3 * max(step, 4) for step in steps]
    inside = [
        (c > m) & (c < whole - m - 1) & (np.abs(np.mod(c + o, 200) - 100) < 100 - m)
        for c, m, o, whole in zip(centers, margins, offset, slide.size, strict=True)
    ]
    outside = [(c < -m) | (c > whole + m) for c, m, whole in zip(centers, margins, slide.size, strict=True)]
    expected = [wave(c + o) for c, o in zip(centers, offset, strict=True)]
    # Half a grey level of the level's rounding and half a one of the result's. OpenSlide takes whole level-0 pixels
    # and interpolates, which cuts off fractions of a grey level.
    slack = 1.5 if slide.reader == "openslide" else 0.0
    if inside[0].any() and inside[1].any():
        columns = pixels[np.ix_(inside[1], inside[0])][..., 0] - expected[0][inside[0]]
        rows = pixels[np.ix_(inside[1], inside[0])][..., 1] - expected[1][inside[1]][:, None]
        assert np.abs(columns).max() <= 1.01 + slack
        assert np.abs(rows).max() <= 1.01 + slack
        assert abs(columns.mean()) < 0.8 + slack / 5
        assert abs(rows.mean()) < 0.8 + slack / 5
    assert (pixels[:, outside[0]] == 255).all()
    assert (pixels[outside[1]] == 255).all()
    return int(inside[0].sum() * inside[1].sum())


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1001 x 811 pixels with levels cut off at 2, 4 and 8."""
    pixels = ramp(1001, 811)
    path = tmp_path_factory.mktemp("slides") / "pyramid.tif"
    return write_pyramid(path, [pixels, *(block_means(pixels, factor) for factor in (2, 4, 8))])


@pytest.fixture(scope="module")
def long_slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """33333 x 401 pixels: its second level has a downsample of 4.00012 in x."""
    pixels = ramp(33333, 401)
    return write_pyramid(tmp_path_factory.mktemp("slides") / "long.tif", [pixels, block_means(pixels, 4)])


@pytest.mark.parametrize("reader", ["auto", "openslide", "tifffile"])
@pytest.mark.parametrize("downsample", [1, 2, 2.5, 4])
@given(st.integers(-20, 200), st.integers(-20, 200), st.integers(30, 400), st.data())
@settings(deadline=None, derandomize=True, max_examples=15)
def test_a_slide_in_memory_gives_the_same_bytes(
    jpeg_slide: Path, reader: str, downsample: float, x: int, y: int, side: int, data: st.DataObject
) -> None:
    box = Box(x, y, side, side)
    inner = Box(x + data.draw(st.integers(0, side - 20)), y + data.draw(st.integers(0, side - 20)), 20, 20)
    size = (round(20 / downsample),) * 2
    with open_slide(jpeg_slide, reader=reader) as slide:
        held = slide.hold(box, 20 / size[0])
        assert held is not None
        expected = slide.read(inner, size)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PyramidSlide, "_read_level", _must_not_read)
            found = held.read(inner, size)
        assert (found == expected).all()
        found[:] = 0
        assert (held.read(inner, size) == expected).all()
        elsewhere = box.shift(300, 200)
        assert (held.read(elsewhere, size) == slide.read(elsewhere, size)).all()


def _must_not_read(*_: object) -> NDArray[np.uint8]:
    raise AssertionError("the file was read")


def test_what_cannot_be_held_is_not(jpeg_slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_slide(jpeg_slide) as slide:
        assert slide.hold(Box(-500, 0, 400, 400), 1) is None
        monkeypatch.setattr("darefine_qupath.slides.resampling.MAX_WINDOW_PIXELS", 100)
        assert slide.hold(Box(0, 0, 11, 11), 1) is None
        assert slide.hold(Box(0, 0, 10, 10), 1) is not None


def test_an_interpolated_level_is_not_held(pyramid: Path) -> None:
    # 1001 and 811 by 2: OpenSlide takes a downsample of 2.0006 and blurs by where a read begins.
    with open_slide(pyramid, reader="openslide") as slide:
        assert slide.hold(Box(0, 0, 100, 100), 2) is None
        assert slide.hold(Box(0, 0, 100, 100), 1) is not None


@pytest.fixture(scope="module")
def jpeg_slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG tiles, which GDAL may read."""
    noise = np.random.default_rng(0).integers(0, 30, (1200, 1500, 1), dtype=np.uint8)
    return write_jpeg_pyramid(tmp_path_factory.mktemp("slides") / "jpeg.tif", ramp(1500, 1200) // 2 + noise)


# Levels and rounding


@pytest.mark.parametrize(
    ("base", "level", "scale"),
    [
        ((33333, 800), (8333, 200), (0.25, 0.25)),
        ((11747, 16557), (1468, 2069), (0.125, 0.125)),
        ((1001, 811), (501, 406), (0.5, 0.5)),
        ((1000, 500), (400, 200), (0.4, 0.4)),
        ((1000, 500), (300, 200), (0.3, 0.4)),
        ((7, 7), (7, 7), (1, 1)),
    ],
    ids=["cut off", "cut off at 8", "rounded up", "2.5", "unequal", "same"],
)
def test_level_scale(base: tuple[int, int], level: tuple[int, int], scale: tuple[float, float]) -> None:
    assert level_scale(base, level) == pytest.approx(scale)


@given(
    x=st.floats(-1e5, 1e5), y=st.floats(-1e5, 1e5), width=st.floats(0.1, 1e4), height=st.floats(0.1, 1e4)
)  # fmt: skip
@settings(deadline=None, derandomize=True)
def test_level_window_holds_the_place_and_little_more(x: float, y: float, width: float, height: float) -> None:
    window = level_window(FloatBox(x, y, width, height))
    inner, box = window.inner, window.box
    assert box.x + inner.x == pytest.approx(x, abs=2e-6)
    assert box.y + inner.y == pytest.approx(y, abs=2e-6)
    assert -1e-5 <= inner.x < 1
    assert inner.x + inner.width <= box.width + 1e-5
    assert box.width < width + 2
    assert box.height < height + 2


def test_level_window_of_whole_pixels_is_whole() -> None:
    assert level_window(level_box(Box(1000, 500, 500, 500), (33333, 800), (8333, 200))).is_whole
    assert not level_window(level_box(Box(1001, 500, 500, 500), (33333, 800), (8333, 200))).is_whole


# The right pixels


@pytest.mark.parametrize("reader", ["openslide", "tifffile", "auto"])
@pytest.mark.parametrize("downsample", [1, 2, 2.5, 4, 5, 10])
@given(x=st.integers(-400, 1100), y=st.integers(-400, 900), data=st.data())
@settings(deadline=None, derandomize=True, max_examples=15)
def test_reads_agree_to_the_pixel(
    pyramid: Path, reader: str, downsample: float, x: int, y: int, data: st.DataObject
) -> None:
    width, height = (data.draw(st.integers(10, 60)) * 10 for _ in "wh")
    size = (math.ceil(width / downsample), math.ceil(height / downsample))
    with open_slide(pyramid, reader=reader) as slide:
        assert_in_place(slide, Box(x, y, width, height), size)


@pytest.mark.parametrize("reader", ["openslide", "tifffile"])
@pytest.mark.parametrize("x", [0, 4, 16001, 16002, 31333, 31335, 32333, 32900])
@pytest.mark.parametrize("downsample", [1, 2, 2.5, 4.00012])
def test_a_downsample_of_4_00012(long_slide: Path, reader: str, x: int, downsample: float) -> None:
    with open_slide(long_slide, reader=reader) as slide:
        assert slide.levels == ((33333, 401), (8333, 100))
        checked = assert_in_place(slide, Box(x, 1, 1600, 400), (round(1600 / downsample), round(400 / downsample)))
    assert checked > 1000


@pytest.mark.parametrize(
    ("reduction", "off"),
    # Each bound lies between the filter that is meant and the next best: Hamming below 4, the plain mean from there on.
    [(1.25, 9.3), (2.5, 6), (3.2, 5), (4, 0.6), (4.8, 3.4), (6, 0.6), (8, 0.6), (9.6, 1.7)],
)
def test_a_reduction_is_near_the_mean_of_its_pixels(tmp_path: Path, reduction: float, off: float) -> None:
    """Noise shows which filter was used, where a ramp looks alike under all."""
    pixels = np.random.default_rng(0).integers(0, 256, (480, 480, 3)).astype(np.uint8)
    box, size = Box(0, 0, 480, 480), (round(480 / reduction),) * 2
    with open_slide(write_pyramid(tmp_path / "noise.tif", [pixels])) as slide:
        difference = slide.read(box, size) - area_means(pixels.astype(float), box, size)
    assert np.abs(difference).mean() < off


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_level_at_its_own_scale_is_read_as_it_is(pyramid: Path, factor: int) -> None:
    pixels = block_means(ramp(1001, 811), factor)
    box = Box(8 * factor, 16 * factor, 40 * factor, 30 * factor)
    for reader in ("tifffile", "openslide"):
        with open_slide(pyramid, reader=reader) as slide:
            difference = slide.read(box, (40, 30)).astype(int) - pixels[16:46, 8:48]
        # OpenSlide interpolates where a level's downsample is not whole.
        assert np.abs(difference).max() <= (0 if reader == "tifffile" else 1)


@pytest.mark.parametrize("reader", ["openslide", "tifffile", "pillow"])
@given(x=st.integers(-300, 1200), y=st.integers(-300, 1000), width=st.integers(1, 300), height=st.integers(1, 300))
@settings(deadline=None, derandomize=True, max_examples=20)
def test_level_0_is_not_touched(pyramid: Path, reader: str, x: int, y: int, width: int, height: int) -> None:
    canvas = np.full((811 + 900, 1001 + 900, 3), 255, np.uint8)
    canvas[300:1111, 300:1301] = ramp(1001, 811)
    path = pyramid if reader != "pillow" else pyramid.with_name("plain.png")
    if reader == "pillow" and not path.exists():
        Image.fromarray(ramp(1001, 811)).save(path, compress_level=1)
    with open_slide(path, reader=reader) as slide:
        read = slide.read(Box(x, y, width, height), (width, height))
    assert read.flags.writeable
    assert (read == canvas[y + 300 : y + 300 + height, x + 300 : x + 300 + width]).all()


def test_bounds_are_cropped_as_qupath_does(pyramid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openslide_reader, "_bounds", lambda *_: Box(101, 53, 803, 702))
    with open_slide(pyramid, reader="openslide") as slide:
        assert slide.size == (803, 702)
        assert slide.levels == ((803, 702), (402, 351), (201, 176), (100, 88))
        for box, downsample in [(Box(0, 0, 400, 400), 1), (Box(-120, -80, 900, 800), 2), (Box(3, 7, 600, 600), 5)]:
            size = (round(box.width / downsample), round(box.height / downsample))
            assert assert_in_place(slide, box, size, (101, 53)) > 100
    with open_slide(pyramid, reader="openslide", crop_bounds=False) as slide:
        assert slide.size == (1001, 811)


@pytest.mark.parametrize(
    ("properties", "bounds"),
    [
        ({}, None),
        ({"x": "0", "y": "0", "width": "100", "height": "50"}, None),
        ({"x": "10", "y": "5", "width": "20", "height": "30"}, Box(10, 5, 20, 30)),
        ({"x": "90", "y": "5", "width": "20", "height": "30"}, Box(90, 5, 10, 30)),
        ({"x": "10", "y": "5"}, Box(10, 5, 90, 45)),
        ({"x": "0", "y": "0", "width": "0", "height": "0"}, None),
    ],
)
def test_bounds_of_a_file(properties: dict[str, str], bounds: Box | None) -> None:
    named = {f"openslide.bounds-{key}": value for key, value in properties.items()}
    assert openslide_reader._bounds(named, Size(100, 50)) == bounds


def test_parts_of_a_large_read_fit(pyramid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = [
        (Box(-50, -30, 1100, 900), (37, 31)),
        (Box(0, 0, 1001, 811), (250, 203)),
        (Box(10, 10, 300, 300), (450, 450)),
    ]
    with open_slide(pyramid, reader="tifffile") as slide:
        whole = [slide.read(*box) for box in boxes]
        monkeypatch.setattr("darefine_qupath.slides.resampling.MAX_WINDOW_PIXELS", 3000)
        parts = [slide.read(*box) for box in boxes]
    for one, other in zip(whole, parts, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1


def test_outside_is_white_and_sizes_are_checked(pyramid: Path) -> None:
    with open_slide(pyramid) as slide:
        assert (slide.read(Box(5000, 0, 10, 10), (7, 3)) == 255).all()
        with pytest.raises(GeometryError, match="positive size, got 0 x 5"):
            slide.read(Box(0, 0, 10, 10), (0, 5))


def test_transparency_shows_white(tmp_path: Path) -> None:
    rgba = np.zeros((20, 20, 4), np.uint8)
    rgba[:, 10:] = (10, 20, 30, 255)
    rgba[:, 5:10] = (0, 0, 0, 128)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    pixels = open_slide(tmp_path / "a.png").read(Box(0, 0, 20, 20), (20, 20))
    assert [tuple(pixels[0, x]) for x in (0, 7, 15)] == [(255,) * 3, (127,) * 3, (10, 20, 30)]


# Readers


def test_gdal_reads_in_openslides_place_where_it_agrees(tmp_path: Path) -> None:
    path = write_jpeg_pyramid(tmp_path / "odd.tif", ramp(1001, 811))
    with open_slide(path) as fast, open_slide(path, reader="openslide") as reference:
        for box, size in [(Box(300, 200, 500, 500), (500, 500)), (Box(-50, 600, 500, 500), (250, 250))]:
            difference = fast.read(box, size).astype(int) - reference.read(box, size)
            assert np.abs(difference).mean() < 2
        assert (fast.reader, reference.reader) == ("tifffile", "openslide")
        # OpenSlide interpolates at a downsample of 1.9987, so that neighbours cannot share what was read.
        whole = Box(100, 100, 600, 600)
        assert reference.hold(whole, 2) is None
        held = fast.hold(whole, 2)
        assert held is not None
        part = Box(300, 240, 200, 200)
        assert (held.read(part, (100, 100)) == fast.read(part, (100, 100))).all()


@pytest.mark.parametrize(("largest", "reader"), [(0.0, "openslide"), (0.2, "tifffile")])
def test_a_reader_is_refused_where_its_pixels_differ(
    jpeg_slide: Path, monkeypatch: pytest.MonkeyPatch, largest: float, reader: str
) -> None:
    monkeypatch.setattr("darefine_qupath.slides.agreement._MAX_DIFFERENCE", largest)
    assert open_slide(jpeg_slide).reader == reader


@pytest.mark.parametrize("reader", ["openslide", "tifffile", "auto"])
def test_slides_pickle_by_their_path(jpeg_slide: Path, reader: str) -> None:
    slide = open_slide(jpeg_slide, reader=reader)
    box = Box(100, 100, 300, 200)
    before = slide.read(box, (150, 100))
    copy = pickle.loads(pickle.dumps(slide))
    assert (copy.read(box, (150, 100)) == before).all()
    assert (copy.size, copy.levels, copy.mpp, copy.reader) == (slide.size, slide.levels, slide.mpp, slide.reader)
    slide.close()
    assert (slide.read(box, (150, 100)) == before).all()


def test_unknown_reader_and_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SlideFormatError, match="no reader 'magic'; it is one of auto, openslide"):
        open_slide(tmp_path, reader="magic")
    with pytest.raises(SlideNotFoundError, match="no such image"):
        open_slide(tmp_path / "a.svs")
    with pytest.raises(SlideFormatError):
        open_slide(tmp_path)


# Files that hold something else, or not all of it


def tiff(path: Path, pixels: NDArray[Any], **options: object) -> Path:
    tifffile.imwrite(path, pixels, **options)
    return path


@pytest.mark.parametrize(
    ("pixels", "options", "message"),
    [
        (np.zeros((32, 32), np.uint16), {}, "uint16"),
        (np.zeros((32, 32), np.uint8), {}, "holds grey"),
        (np.zeros((32, 32), np.float32), {}, "float32"),
        (np.zeros((3, 32, 32), np.uint8), {"ome": True, "metadata": {"axes": "ZYX"}}, "3 z-slices"),
        (np.zeros((2, 32, 32), np.uint8), {"ome": True, "metadata": {"axes": "CYX"}}, "2 channels"),
        (np.zeros((2, 32, 32), np.uint8), {"ome": True, "metadata": {"axes": "TYX"}}, "2 time points"),
        (np.zeros((5, 32, 32, 3), np.uint8), {"photometric": "rgb"}, "5 images"),
        (np.zeros((32, 32, 4), np.uint8), {"photometric": "separated"}, "CMYK"),
        (np.zeros((64, 64), np.uint16), {"tile": (32, 32)}, "uint16"),
        (np.zeros((64, 64), np.uint8), {"tile": (32, 32)}, "holds grey"),
        (np.zeros((4, 64, 64, 3), np.uint8), {"tile": (32, 32), "photometric": "rgb"}, "4 images"),
    ],
)
def test_tiffs_without_rgb_are_refused_by_name(
    tmp_path: Path, pixels: NDArray[Any], options: dict[str, object], message: str
) -> None:
    path = tiff(tmp_path / "a.tif", pixels, **options)
    with pytest.raises(SlideFormatError, match=message) as error:
        open_slide(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("mode", "what"), [("L", "8-bit grey"), ("I;16", "16-bit grey"), ("1", "1-bit"), ("LA", "grey")]
)
def test_plain_images_without_rgb_are_refused_by_name(tmp_path: Path, mode: str, what: str) -> None:
    Image.new(mode, (9, 9)).save(tmp_path / "a.png")
    with pytest.raises(SlideFormatError, match=what):
        open_slide(tmp_path / "a.png")


def test_cmyk_and_animations_are_refused_by_name(tmp_path: Path) -> None:
    Image.new("CMYK", (9, 9)).save(tmp_path / "a.jpg")
    with pytest.raises(SlideFormatError, match="CMYK"):
        open_slide(tmp_path / "a.jpg")
    frames = [Image.new("RGB", (9, 9), (value, 0, 0)) for value in (10, 99)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(SlideFormatError, match="2 images"):
        open_slide(tmp_path / "a.gif")


@pytest.mark.parametrize("suffix", ["png", "jpg", "jp2", "bmp"])
def test_plain_images_open(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(ramp(90, 70)).save(tmp_path / f"a.{suffix}", dpi=(72, 72))
    with open_slide(tmp_path / f"a.{suffix}") as slide:
        assert (slide.size, slide.mpp, slide.reader) == ((90, 70), None, "pillow")


def test_planar_tiff_opens(tmp_path: Path) -> None:
    pixels = ramp(90, 70)
    path = tiff(tmp_path / "a.tif", pixels.transpose(2, 0, 1).copy(), photometric="rgb", planarconfig="separate")
    with open_slide(path) as slide:
        assert (slide.read(Box(0, 0, 90, 70), (90, 70)) == pixels).all()


def test_large_plain_images_open_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (200, 150)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "a.png")
    assert open_slide(tmp_path / "a.png").size == (200, 150)
    assert Image.MAX_IMAGE_PIXELS == 10_000
    monkeypatch.setattr(pillow_reader, "MAX_PLAIN_PIXELS", 10_000)
    with pytest.raises(SlideFormatError, match=r"200 x 150 pixels are too many.*tiled pyramidal TIFF"):
        open_slide(tmp_path / "a.png")


def test_text_and_cut_images(tmp_path: Path) -> None:
    (tmp_path / "a.svs").write_text("no image")
    with pytest.raises(SlideFormatError, match="no reader opens this file: OpenSlide does not know"):
        open_slide(tmp_path / "a.svs")
    Image.fromarray(ramp(400, 400)).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:900])
    with pytest.raises(SlideError, match="damaged"):
        open_slide(tmp_path / "a.png")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_slide_that_was_cut_short_is_refused(jpeg_slide: Path, tmp_path: Path, share: float) -> None:
    path = tmp_path / "cut.tif"
    content = jpeg_slide.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(SlideError, match=r"(cut short|Short read).*copy"):
        open_slide(path)


@pytest.fixture
def damaged(jpeg_slide: Path, tmp_path: Path) -> Path:
    """The slide with the end of the tile at (512, 256) overwritten by zeros."""
    path = shutil.copy(jpeg_slide, tmp_path / "damaged.tif")
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        index = 1 * math.ceil(page.imagewidth / page.tilewidth) + 2
        offset, count = page.dataoffsets[index], page.databytecounts[index]
    with path.open("r+b") as file:
        file.seek(offset + count // 2)
        file.write(bytes(count - count // 2))
    return path


@pytest.mark.parametrize("reader", ["openslide", "auto"])
def test_a_damaged_tile_is_told_by_its_place(damaged: Path, reader: str) -> None:
    with open_slide(damaged, reader=reader) as slide:
        for _ in range(2):
            with pytest.raises(SlideError, match=r"damaged\.tif: the box x 400, y 200, 300 x 300 \(level-0 pixels\)"):
                slide.read(Box(400, 200, 300, 300), (300, 300))
            assert slide.read(Box(0, 0, 250, 250), (250, 250)).mean() < 200
            assert slide.hold(Box(400, 200, 300, 300), 1) is None
        # The other levels are whole.
        assert slide.read(Box(0, 0, 1500, 1200), (375, 300)).mean() < 200


@pytest.mark.parametrize("is_big", [False, True])
@given(share=st.floats(0.001, 0.999))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_ome_tiff_cut_short_anywhere_is_refused(tmp_path: Path, is_big: bool, share: float) -> None:
    """Its description and its pyramid stand at its end: without them it would be a slide of one level, unscaled."""
    whole = ome_tiff(tmp_path / f"{is_big}.ome.tif", [ramp(256, 192), ramp(128, 96)], physical(0.25, 0.25), big=is_big)
    cut = tmp_path / "cut.ome.tif"
    cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])
    with pytest.raises(SlideError, match=r"cut\.ome\.tif: .*(again|no reader opens this file)"):
        open_slide(cut)


def test_a_tile_that_was_left_out_is_white(tmp_path: Path) -> None:
    path = ome_tiff(tmp_path / "a.ome.tif", [ramp(256, 192)], physical(0.25, 0.25))
    with tifffile.TiffFile(path, mode="r+b") as file:
        tags = file.pages.first.tags
        for name in ("TileOffsets", "TileByteCounts"):
            tags[name].overwrite((*tags[name].value[:5], 0, *tags[name].value[6:]))
    with open_slide(path) as slide:
        wanted = ramp(256, 192)
        wanted[64:128, 64:128] = 255
        assert (slide.read(Box(0, 0, 256, 192), (256, 192)) == wanted).all()
        assert (slide.read(Box(70, 50, 40, 40), (40, 40)) == wanted[50:90, 70:110]).all()


# Pixel size


@pytest.mark.parametrize(
    ("options", "mpp"),
    [
        ({"resolution": (20000, 20100), "resolutionunit": "CENTIMETER"}, 0.498756),
        ({"resolution": (50800, 50800), "resolutionunit": "INCH"}, 0.5),
        ({"resolution": (72, 72), "resolutionunit": "INCH"}, None),
        ({"resolution": (96, 96), "resolutionunit": "INCH"}, None),
        ({"resolution": (20000, 20000), "resolutionunit": "NONE"}, None),
        ({}, None),
        ({"imagej": True, "resolution": (4, 4), "metadata": {"unit": "um"}}, 0.25),
        ({"ome": True, "metadata": {"PhysicalSizeX": 0.3, "PhysicalSizeY": 0.3}}, 0.3),
        ({"ome": True, "metadata": {"PhysicalSizeX": 300, "PhysicalSizeXUnit": "nm"}}, 0.3),
        ({"resolution": (20000, 25000), "resolutionunit": "CENTIMETER"}, None),
    ],
)
def test_pixel_size_of_a_tiff(tmp_path: Path, options: dict[str, object], mpp: float | None) -> None:
    path = tiff(tmp_path / "a.tif", ramp(64, 48), photometric="rgb", **options)
    assert open_slide(path, reader="tifffile").mpp == (None if mpp is None else pytest.approx(mpp, rel=1e-6))


def test_pixel_size_through_openslide(tmp_path: Path) -> None:
    path = write_pyramid(
        tmp_path / "a.tif", [ramp(300, 200)], resolution=(20000, 20000), resolutionunit="CENTIMETER"
    )  # fmt: skip
    assert open_slide(path, reader="openslide").mpp == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("size", "is_plausible"),
    [((0.5, 0.25), True), ((352.8, 352.8), False), ((0.5, 0.0), False), ((math.nan, 0.5), False), ((1e300, 1), False)],
)
def test_pixels_of_a_microscope(size: tuple[float, float], is_plausible: bool) -> None:
    assert is_plausible_pixel_size(PixelSize(*size)) == is_plausible


# Micrometres per pixel of 0.25 um, whatever the unit.
UNITS = {
    None: 0.25, "\u00b5m": 0.25, "\u03bcm": 0.25, "um": 0.25, "nm": 250, "mm": 2.5e-4, "cm": 2.5e-5, "m": 2.5e-7,
    "\u00c5": 2500, "\u212b": 2500, "in": 0.25 / 25_400,
}  # fmt: skip


def ome_tiff(path: Path, levels: Sequence[NDArray[np.uint8]], pixels: str, *, big: bool = False) -> Path:
    """OME-TIFF with a pyramid in SubIFDs and `pixels` among the attributes of Pixels."""
    with tifffile.TiffWriter(path, ome=True, bigtiff=big) as file:
        kind = {"photometric": "rgb", "tile": (64, 64), "metadata": {"axes": "YXS"}}
        file.write(levels[0], subifds=len(levels) - 1, **kind)
        for level in levels[1:]:
            file.write(level, subfiletype=1, **{**kind, "metadata": None})
    xml = tifffile.tiffcomment(path).replace("<Pixels ", f"<Pixels {pixels} ")
    tifffile.tiffcomment(path, xml.encode())
    return path


def physical(x: object, y: object, unit: str | None = None) -> str:
    units = "" if unit is None else f' PhysicalSizeXUnit="{unit}" PhysicalSizeYUnit="{unit}"'
    return f'PhysicalSizeX="{x}" PhysicalSizeY="{y}"{units}'


@pytest.mark.parametrize("unit", UNITS)
def test_ome_tiff_has_its_unit_and_its_pyramid(tmp_path: Path, unit: str | None) -> None:
    levels = [ramp(256, 192), ramp(256, 192)[::2, ::2], ramp(256, 192)[::4, ::4]]
    path = ome_tiff(tmp_path / "a.ome.tif", levels, physical(UNITS[unit], UNITS[unit], unit))
    with open_slide(path) as slide:
        assert (slide.mpp, slide.levels) == (0.25, ((256, 192), (128, 96), (64, 48)))
        assert (slide.read(Box(0, 0, 256, 192), (256, 192)) == levels[0]).all()
        assert (slide.read(Box(0, 0, 256, 192), (128, 96)) == levels[1]).all()


@pytest.mark.parametrize(
    ("pixels", "stated", "mpp"),
    [
        (physical(0.25, 0.5), PixelSize(0.25, 0.5), None),
        (physical(0.25, 0.2512), PixelSize(0.25, 0.2512), 0.2506),
        (physical(0, -1), PixelSize(0, -1), None),
        (physical(1e300, 1e300), PixelSize(1e300, 1e300), None),
        (physical(0.25, 0.25, "pixel"), None, None),
        (physical("x", "y"), None, None),
    ],
)
def test_pixels_that_are_not_square_or_not_possible(
    tmp_path: Path, pixels: str, stated: PixelSize | None, mpp: float | None
) -> None:
    with open_slide(ome_tiff(tmp_path / "a.ome.tif", [ramp(64, 48)], pixels)) as slide:
        assert (slide.stated_pixel_size, slide.mpp) == (stated, mpp and pytest.approx(mpp))


def test_resolve_mpp(pyramid: Path) -> None:
    slide = open_slide(pyramid)
    assert resolve_mpp(0.3, 0.4, slide) == 0.3
    assert resolve_mpp(None, 0.4, slide) == 0.4
    with pytest.raises(MissingMppError, match="give it with --mpp"):
        resolve_mpp(None, None, slide)
    with pytest.raises(MissingMppError, match=r"-1 um is not possible"):
        resolve_mpp(-1, 0.4, slide)
    slide.mpp = 0.25
    assert resolve_mpp(None, None, slide) == 0.25


# Tissue


def painted(tmp_path: Path, **areas: tuple[tuple[int, int, int, int], tuple[int, int, int]]) -> Path:
    """Slide of 1500 x 1000 pixels with rectangles (x, y, width, height) of a colour; noise as from a camera."""
    pixels = np.full((1000, 1500, 3), 240, np.int16)
    for (x, y, width, height), color in areas.values():
        pixels[y : y + height, x : x + width] = color
    rng = np.random.default_rng(0)
    pixels += rng.integers(-12, 13, (1000, 1500, 1), np.int16) + rng.integers(-3, 4, (1000, 1500, 3), np.int16)
    for name, ((x, y, width, height), color) in areas.items():
        if name.startswith("flat"):
            pixels[y : y + height, x : x + width] = color
    path = tmp_path / "painted.tif"
    tiff(path, pixels.clip(0, 255).astype(np.uint8), photometric="rgb", tile=(256, 256))
    return path


STAINED = {
    "eosin": (225, 160, 190),
    "haematoxylin": (110, 80, 150),
    "pale stroma": (232, 215, 228),
    "dense nuclei": (70, 45, 100),
    "blood": (190, 40, 60),
    "brown stain": (150, 110, 80),
}
NOT_TISSUE = {
    "blue pen": (40, 60, 150),
    "ball pen": (50, 50, 160),
    "green pen": (30, 120, 80),
    "black pen": (35, 35, 40),
    "flat fill": (243, 243, 243),
    "flat black": (0, 0, 0),
    "flat grey": (200, 200, 200),
    "glass": (238, 238, 238),
}


@pytest.mark.parametrize("color", STAINED.values(), ids=STAINED)
def test_tissue_is_found(tmp_path: Path, color: tuple[int, int, int]) -> None:
    with open_slide(painted(tmp_path, tissue=((300, 200, 500, 400), color))) as slide:
        mask = tissue_mask(slide, mpp=1.0)
    assert mask.fraction(Box(300, 200, 500, 400)) > 0.97
    assert mask.fraction(Box(0, 0, 1500, 150)) == 0
    assert mask.mask.mean() * mask.size.width * mask.size.height == pytest.approx(500 * 400, rel=0.1)


@pytest.mark.parametrize("name", NOT_TISSUE)
def test_what_is_no_tissue_is_left_out(tmp_path: Path, name: str) -> None:
    areas = {
        "tissue": ((900, 200, 450, 450), (225, 160, 190)),
        "flat" if name.startswith("flat") else "other": ((150, 150, 450, 450), NOT_TISSUE[name]),
    }
    with open_slide(painted(tmp_path, **areas)) as slide:
        mask = tissue_mask(slide, mpp=1.0)
    assert mask.fraction(Box(200, 200, 350, 350)) == 0
    assert mask.fraction(Box(900, 200, 450, 450)) > 0.97


def test_holes_are_filled_and_specks_dropped(tmp_path: Path) -> None:
    areas = {
        "tissue": ((300, 200, 700, 600), (225, 160, 190)),
        "lumen": ((500, 400, 100, 100), (240, 240, 240)),
        "cavity": ((650, 350, 300, 350), (240, 240, 240)),
        "speck": ((100, 100, 20, 20), (225, 160, 190)),
    }
    with open_slide(painted(tmp_path, **areas)) as slide:
        mask = tissue_mask(slide, mpp=1.0)
    assert mask.fraction(Box(500, 400, 100, 100)) == 1
    assert mask.fraction(Box(700, 400, 200, 250)) == 0
    assert mask.fraction(Box(0, 0, 250, 500)) <= 1e-12
    assert mask.fraction(Box(250, 150, 75, 75)) > 1e-12


def test_grey_dust_is_left_out_and_costs_no_tissue(tmp_path: Path) -> None:
    gray = (120, 118, 121)
    areas = {
        "tissue": ((300, 200, 700, 600), (225, 160, 190)),
        "dust": ((600, 450, 80, 80), gray),
        "more": ((1200, 450, 80, 80), gray),
    }
    with open_slide(painted(tmp_path, **areas)) as slide:
        mask = tissue_mask(slide, mpp=1.0)
    assert mask.fraction(Box(300, 200, 700, 600)) > 0.97
    assert mask.fraction(Box(1100, 350, 300, 300)) <= 1e-12
    # A stain without colour, or a grey scanner.
    with open_slide(painted(tmp_path, silver=((300, 200, 700, 600), gray))) as slide:
        assert tissue_mask(slide, mpp=1.0).fraction(Box(300, 200, 700, 600)) > 0.97


def test_glass_alone_and_tissue_alone(tmp_path: Path) -> None:
    with open_slide(painted(tmp_path)) as slide:
        assert tissue_mask(slide, mpp=1.0).mask.mean() == 0
    with open_slide(painted(tmp_path, tissue=((0, 0, 1500, 1000), (215, 150, 190)))) as slide:
        assert tissue_mask(slide, mpp=1.0).mask.mean() == 1


def test_mask_without_pixel_size_and_of_a_tiny_slide(tmp_path: Path) -> None:
    with open_slide(painted(tmp_path, tissue=((300, 200, 500, 400), (225, 160, 190)))) as slide:
        mask = tissue_mask(slide)
    assert mask.mask.shape == (50, 75)
    height, width = mask.mask.shape
    assert (mask.size.width / width + mask.size.height / height) / 2 == 20
    Image.fromarray(np.full((3, 2, 3), (225, 160, 190), np.uint8)).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png") as slide:
        assert tissue_mask(slide, mpp=1.0).mask.shape == (1, 1)


@given(
    x=st.integers(-50, 130), y=st.integers(-50, 90), width=st.integers(1, 120), height=st.integers(1, 90)
)  # fmt: skip
@settings(deadline=None, derandomize=True)
def test_fraction_is_exact(x: int, y: int, width: int, height: int) -> None:
    mask = np.random.default_rng(0).random((8, 10)) < 0.5
    fine = np.zeros((80 + 200, 100 + 200), bool)
    fine[100:180, 100:200] = np.kron(mask, np.ones((10, 10), bool))
    tissue = TissueMask(mask, Size(100, 80))
    expected = fine[y + 100 : y + 100 + height, x + 100 : x + 100 + width].mean()
    assert tissue.fraction(Box(x, y, width, height)) == pytest.approx(expected, abs=1e-9)
    assert (tissue.fraction(Box(x, y, width, height)) > 1e-12) == (expected > 0)


def test_a_mask_of_nothing_is_refused() -> None:
    with pytest.raises(GeometryError, match="No tissue mask"):
        TissueMask(np.zeros((0, 5), bool), Size(10, 10))


# Real files


def test_every_shared_image_opens_or_is_refused_by_name(shared: Path) -> None:
    refused = {
        "cells-2c.ome.tif": "2 channels",
        "cells-2t.ome.tif": "2 time points",
        "cells-2z.ome.tif": "2 z-slices",
        "cells-gray16.tif": "uint16",
        "cells-gray32.tif": "float32",
        "cells-gray8.png": "8-bit grey",
    }
    paths = [path for path in (shared / "slides").rglob("*.*") if path.suffix != ".md"]
    assert len(paths) == 13
    for path in paths:
        if path.name in refused:
            with pytest.raises(SlideFormatError, match=refused[path.name]):
                open_slide(path)
            continue
        with open_slide(path) as slide:
            pixels = slide.read(Box(-5, -5, 60, 60), (30, 30))
            assert pixels[5:, 5:].std() > 0
            assert (pixels[0] == 255).all()


@pytest.mark.parametrize(
    ("name", "mpp"), [("CMU-1-Small-Region.svs", 0.499), ("HE_example.tif", 0.50008), ("cells/cells.ome.tif", 0.25)]
)
def test_pixel_sizes_of_shared_images(shared: Path, name: str, mpp: float) -> None:
    assert open_slide(shared / "slides" / name).mpp == pytest.approx(mpp, abs=1e-5)


def test_levels_of_a_real_slide_lie_on_one_another(shared: Path) -> None:
    with open_slide(shared / "bach/slides/A03_roi1.tif") as slide:
        for x, y in [(7504, 1000), (6200, 8000), (6400, 15496)]:
            fine = slide.read(Box(x, y, 1000, 1000), (1000, 1000)).reshape(125, 8, 125, 8, 3).mean(axis=(1, 3))
            errors = {
                (dx, dy): np.abs(fine - slide.read(Box(x + dx, y + dy, 1000, 1000), (125, 125))).mean()
                for dx in (-4, 0, 4)
                for dy in (-4, 0, 4)
            }
            assert min(errors, key=lambda shift: errors[shift]) == (0, 0)


def test_mosaic_fill_of_a_real_slide_is_no_tissue(shared: Path) -> None:
    with open_slide(shared / "bach/slides/A03_roi1.tif") as slide:
        mask = tissue_mask(slide)
    assert mask.fraction(Box(0, 0, 3500, 6000)) == 0
    assert mask.fraction(Box(3500, 12500, 4000, 3500)) > 0.99
    assert mask.fraction(Box(7000, 1000, 1500, 2000)) > 0.95
