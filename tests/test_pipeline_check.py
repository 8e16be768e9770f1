"""What `darefine check` finds: each fault in a project that has just that one."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapely
import tifffile
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

from darefine_qupath.annotations import Annotation
from darefine_qupath.classes import Color, PathClass
from darefine_qupath.geometry import PixelSize
from darefine_qupath.pipeline.alignment import check_alignment
from darefine_qupath.pipeline.check import Finding, check_project
from darefine_qupath.pipeline.settings import Settings
from darefine_qupath.project import ImageEntry
from darefine_qupath.slides import PyramidSlide, open_slide
from tests.fake_project import FakeProject

SIZE = (1600, 1200)


class ProjectOfFiles(FakeProject):
    """A project in memory whose images are files."""

    def __init__(self, folder: Path, entries: Sequence[ImageEntry]) -> None:
        super().__init__(folder)
        self.entries = tuple(entries)
        self.class_list = (PathClass("Tumor", Color(200, 0, 0)),)

    @property
    def images(self) -> tuple[ImageEntry, ...]:
        return self.entries


def tissue(seed: int = 0) -> NDArray[np.uint8]:
    """Blotches of some 20 px on the left half, white glass on the right."""
    rng = np.random.default_rng(seed)
    blotches = rng.integers(60, 210, (SIZE[1] // 20, SIZE[0] // 20), dtype=np.uint8)
    pixels = np.repeat(np.repeat(blotches, 20, axis=0), 20, axis=1)[..., None] + np.array([0, 10, 20], np.uint8)
    pixels[:, SIZE[0] // 2 :] = 245
    return np.ascontiguousarray(pixels.astype(np.uint8))


def write(path: Path, pixels: NDArray[np.uint8], moved: tuple[int, int] = (0, 0)) -> Path:
    """Write a pyramid of two levels, the second one moved by some of its pixels in x and y."""
    height, width = pixels.shape[0] // 4, pixels.shape[1] // 4
    coarse = pixels.reshape(height, 4, width, 4, 3).mean(axis=(1, 3)).astype(np.uint8)
    coarse = np.roll(coarse, moved[::-1], axis=(0, 1))
    with tifffile.TiffWriter(path) as tiff:
        for number, level in enumerate((pixels, coarse)):
            options = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
            tiff.write(level, tile=(256, 256), photometric="rgb", subfiletype=int(number > 0), **options)
    return path


def entry(path: Path, number: int = 1, **changes: object) -> ImageEntry:
    values = {"id": str(number), "name": path.name, "uri": path.as_uri(), "path": path, "exists": True}
    return ImageEntry(**{**values, "width": SIZE[0], "height": SIZE[1], **changes})


Check = Callable[..., tuple[Finding, ...]]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Check a project of one image with shapes of class Tumor."""

    def call(path: Path, *shapes: BaseGeometry, path_class: str | None = "Tumor") -> tuple[Finding, ...]:
        project = ProjectOfFiles(tmp_path, [entry(path)])
        project.stored["1"] = tuple(Annotation(geometry=shape, path_class=path_class) for shape in shapes)
        return check_project(project, Settings())

    return call


LARGE = shapely.box(0, 0, 780, 1200)


def test_a_sound_project_has_no_findings(check: Check, tmp_path: Path) -> None:
    assert check(write(tmp_path / "a.tif", tissue()), LARGE) == ()


@pytest.mark.parametrize("moved", [(2, 0), (0, -3), (-1, 2)])
def test_a_level_beside_the_other_is_an_error(check: Check, tmp_path: Path, moved: tuple[int, int]) -> None:
    found = check(write(tmp_path / "a.tif", tissue(), moved), LARGE, shapely.box(40, 40, 200, 200))
    assert [item.level for item in found] == ["error"]
    shift = f"({4 * moved[0]}, {4 * moved[1]})"
    assert "Under 2 of 2 annotations the levels of the pyramid differ" in found[0].message
    assert f"the coarse level is shifted by {shift} px against level 0" in found[0].message


def test_a_level_of_other_colours_is_an_error(check: Check, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(tissue(), tile=(256, 256), photometric="rgb")
        tiff.write(tissue()[::4, ::4] // 2, tile=(256, 256), photometric="rgb", subfiletype=1)
    found = check(path, LARGE)
    assert [item.level for item in found if "levels differ by" in item.message] == ["error"]


def test_an_annotation_on_glass_is_a_warning(check: Check, tmp_path: Path) -> None:
    found = check(write(tmp_path / "a.tif", tissue()), LARGE, shapely.box(1000, 100, 1400, 300))
    assert [item.level for item in found] == ["warning"]
    assert "1 of 2 annotations lie on white glass (Tumor at (1200, 200))" in found[0].message


with np.errstate(invalid="ignore"):
    NOT_A_NUMBER = shapely.Polygon([(0, 0), (9, 0), (np.nan, 9)])
OVERHANGING = shapely.box(-100, 0, 100, 100)
BOWTIE = shapely.Polygon([(100, 100), (300, 300), (300, 100), (100, 300)])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (BOWTIE, "is not a valid shape: Self-intersection[200 200]"),
        (shapely.LineString([(0, 0), (9, 9)]), "has no area and labels nothing (a line or points)"),
        (OVERHANGING, "lies 50 % outside the image"),
        (shapely.box(5000, 0, 5100, 100), "lies 100 % outside the image"),
        (shapely.Polygon(), "has no shape"),
        (NOT_A_NUMBER, "has a coordinate that is not a number; draw it again"),
    ],
    ids=["crossing", "line", "overhanging", "outside", "empty", "nan"],
)
def test_a_bad_shape_is_named(check: Check, tmp_path: Path, shape: BaseGeometry, message: str) -> None:
    found = check(write(tmp_path / "a.tif", tissue()), LARGE, shape)
    assert {(item.level, item.image) for item in found} == {("warning", "a.tif")}
    assert found[-1].message.endswith(message)
    assert len(found) == 1 + (shape not in (BOWTIE, OVERHANGING))


def test_many_bad_shapes_are_counted(check: Check, tmp_path: Path) -> None:
    found = check(write(tmp_path / "a.tif", tissue()), LARGE, *[BOWTIE] * 40)
    assert len(found) == 6
    assert found[-1].message == "35 more annotations: not a valid shape"


def test_annotations_without_class_and_small_classes_are_counted(check: Check, tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", tissue())
    assert check(path, LARGE, path_class=None)[0].message == "1 objects cannot train: 1 without a class"
    assert "Class 'Tumor' has only 10000 level-0 pixels in all" in check(path, shapely.box(0, 0, 100, 100))[0].message


def test_files_of_the_same_bytes_are_an_error(tmp_path: Path) -> None:
    first = write(tmp_path / "a.tif", tissue())
    copy = Path(shutil.copy(first, tmp_path / "b.tif"))
    other = write(tmp_path / "c.tif", tissue(1))
    project = ProjectOfFiles(tmp_path, [entry(first), entry(copy, 2), entry(other, 3), entry(first, 4, name="a again")])
    project.stored["1"] = (Annotation(geometry=LARGE, path_class="Tumor"),)
    found = check_project(project, Settings())
    assert [item.level for item in found] == ["warning", "error"]
    assert "2 entries show the same file" in found[0].message
    assert "2 files have the same content: 'a.tif', 'b.tif'" in found[1].message


def test_a_slide_without_pixel_size_and_one_of_another_size(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, tissue(), tile=(256, 256), photometric="rgb")
    project = ProjectOfFiles(tmp_path, [entry(path), entry(path, 2, width=99, name="b")])
    found = check_project(project, Settings())
    assert "neither the project nor the file knows the pixel size" in found[0].message
    assert "QuPath lists it as 99 x 1200 px" in found[1].message
    assert not [item for item in check_project(project, Settings(), mpp=0.5) if "pixel size" in item.message]


def stated(path: Path, resolution: tuple[float, float]) -> Path:
    tifffile.imwrite(path, tissue(), tile=(256, 256), photometric="rgb", resolution=resolution, resolutionunit=3)
    return path


def findings(image: ImageEntry, tmp_path: Path, **options: float) -> list[str]:
    project = ProjectOfFiles(tmp_path, [image])
    project.stored["1"] = (Annotation(geometry=shapely.box(0, 0, 500, 500), path_class="Tumor"),)
    found = [f"{finding.level} {finding.message}" for finding in check_project(project, Settings(), **options)]
    return [line for line in found if "little to learn from" not in line]


def test_pixels_that_are_not_square_are_refused_and_not_averaged(tmp_path: Path) -> None:
    image = entry(stated(tmp_path / "a.tif", (40_000, 20_000)))
    (found,) = [line for line in findings(image, tmp_path) if line.startswith("error")]
    assert "its pixels are not square (0.25 x 0.5 um by its file)" in found
    assert findings(image, tmp_path, mpp=0.25) == []
    assert findings(replace(image, pixel_size=PixelSize(0.25, 0.25), mpp=0.25), tmp_path) == []


def test_pixels_that_qupath_has_as_not_square_are_refused(tmp_path: Path) -> None:
    image = entry(stated(tmp_path / "a.tif", (40_000, 40_000)), pixel_size=PixelSize(0.25, 0.5))
    (found,) = [line for line in findings(image, tmp_path) if line.startswith("error")]
    assert "its pixels are not square (0.25 x 0.5 um by QuPath's calibration)" in found


@pytest.mark.parametrize("size", [(0, 0.25), (-1, -1), (math.nan, 0.25), (1e300, 1e300)])
def test_a_pixel_size_that_is_not_possible_is_named_and_not_used(tmp_path: Path, size: tuple[float, float]) -> None:
    image = entry(stated(tmp_path / "a.tif", (40_000, 40_000)), pixel_size=PixelSize(*size))
    (found,) = findings(image, tmp_path)
    assert found.startswith("warning QuPath's calibration says pixels of")
    assert found.endswith("which is impossible; it is ignored")


def test_blocks_are_read_once_for_all_annotations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    read = PyramidSlide.read
    monkeypatch.setattr(PyramidSlide, "read", lambda self, *where: reads.append(where) or read(self, *where))
    rng = np.random.default_rng(0)
    corners = rng.integers(0, (780, 1180), (3000, 2))
    with open_slide(write(tmp_path / "a.tif", tissue())) as slide:
        places = list(check_alignment(slide, [shapely.box(x, y, x + 12, y + 9) for x, y in corners]))
    assert sorted(place.index for place in places) == list(range(3000))
    assert not any(place.is_misaligned or place.glass for place in places)
    # Two blocks of level 0 down the left side, each at two levels.
    assert len(reads) == 4
