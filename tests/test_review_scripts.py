from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from darefine_qupath.errors import ReviewError
from darefine_qupath.geometry import Box, Size
from darefine_qupath.prediction import ScoreMap
from darefine_qupath.prediction.blend import MapRows
from darefine_qupath.prediction.scoremap_writer import write_score_map
from darefine_qupath.project import jvm
from darefine_qupath.review import install_scripts, script_names
from darefine_qupath.review.new_objects import _PREFIX as MEASUREMENT
from darefine_qupath.review.review_marks import _PREFIX as PLACE_NAME
from darefine_qupath.review.tags import RUN
from tests.prediction_stubs import CLASSES, blobs
from tests.test_project_paquo import qupath
from tests.tile_slides import write_pyramid


def text(name: str) -> str:
    return (Path(__file__).parents[1] / "scripts" / "qupath" / name).read_text(encoding="utf-8")


def test_every_step_of_the_review_has_a_script() -> None:
    assert script_names() == (
        "accept_selected.groovy",
        "hide_below_confidence.groovy",
        "next_place.groovy",
        "predict_this_image.groovy",
        "predict_this_project.groovy",
        "reject_selected.groovy",
        "show_score_map.groovy",
    )


def test_scripts_speak_of_the_names_that_are_written() -> None:
    assert f'"{MEASUREMENT}confidence"' in text("hide_below_confidence.groovy")
    assert f'containsKey("{RUN}")' in text("accept_selected.groovy")
    assert f'containsKey("{RUN}")' in text("reject_selected.groovy")
    assert f"/{PLACE_NAME} \\d+/" in text("next_place.groovy")
    assert "setLocked(true)" in text("accept_selected.groovy")


def test_scripts_are_copied(tmp_path: Path) -> None:
    paths = install_scripts(tmp_path / "new" / "scripts")
    assert [path.name for path in paths] == list(script_names())
    assert all(path.read_text(encoding="utf-8") == text(path.name) for path in paths)
    assert install_scripts(tmp_path / "new" / "scripts") == paths


def test_a_changed_script_is_not_overwritten_unasked(tmp_path: Path) -> None:
    (tmp_path / "next_place.groovy").write_text("mine")
    with pytest.raises(ReviewError, match=r"other versions of next_place\.groovy; use --force"):
        install_scripts(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["next_place.groovy"]
    install_scripts(tmp_path, overwrite=True)
    assert (tmp_path / "next_place.groovy").read_text(encoding="utf-8") == text("next_place.groovy")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ReviewError, match="Cannot put the scripts into"):
        install_scripts(tmp_path / "file" / "scripts")


# -- with QuPath: the score map as it shows it

MAP = Size(700, 900)
"""Several tiles of 256, and three levels."""


def a_map(folder: Path, *, downsample: float = 8.0, corner: tuple[int, int] = (0, 0)) -> tuple[ScoreMap, MapRows]:
    label = blobs(MAP, seed=1)
    label[:200, :150] = 255
    scores = np.random.default_rng(0).integers(1, 256, (2, *label.shape), np.uint8)
    scores[:, label == 255] = 0
    layers = MapRows(label, scores[0], scores[1], np.where(label == 255, 255, (label + 1) % 3).astype(np.uint8))
    covered = Box.covering((0, 0, MAP.width * downsample, MAP.height * downsample))
    folder.mkdir(parents=True)
    found = ScoreMap(
        folder=folder, size=MAP, box=Box(*corner, *covered.size), downsample=downsample, mpp=0.25, classes=CLASSES,
        model_id="m", fingerprint="f", class_pixels=(1, 1, 1), num_slices=1,
    )  # fmt: skip
    write_score_map(found, [layers])
    return found, layers


def argb(image: Any) -> NDArray[np.uint32]:  # noqa: ANN401 - of Java
    """Pixels of a Java image, shape (height, width), as 0xAARRGGBB."""
    width, height = image.getWidth(), image.getHeight()
    pixels = np.array(image.getRGB(0, 0, width, height, None, 0, width), np.int32)
    return pixels.view(np.uint32).reshape(height, width)


def class_colors() -> NDArray[np.uint32]:
    """0xAARRGGBB per label; nothing at all where nothing was predicted."""
    colors = np.zeros(256, np.uint32)
    colors[: len(CLASSES.colors)] = [0xFF000000 | red << 16 | green << 8 | blue for red, green, blue in CLASSES.colors]
    return colors


def opened_by_openslide(servers: Any, path: Path) -> Any:  # noqa: ANN401 - Java's
    jpype = pytest.importorskip("jpype")
    try:
        server = servers.buildServer(jvm.java_class("java.io.File")(str(path)).toURI())
    except jpype.JException:
        return None
    return server if "OpenSlide" in str(server.getServerType()) else None


@qupath
def test_qupath_opens_the_files_of_a_score_map(tmp_path: Path) -> None:
    found, layers = a_map(tmp_path / "map")
    jvm.start_qupath()
    servers, request = (
        jvm.java_class("qupath.lib.images.servers.ImageServers"),
        jvm.java_class("qupath.lib.regions.RegionRequest"),
    )
    # A slide that every OpenSlide opens tells a QuPath without it from a map that QuPath does not like.
    plain = write_pyramid(tmp_path / "plain.tif", np.full((600, 600, 3), 200, np.uint8), (2, 4))
    control = opened_by_openslide(servers, plain)
    if control is None:
        pytest.skip("this QuPath finds no OpenSlide")
    expected = class_colors()
    expected[255] = 0xFFFFFFFF  # A TIFF has no transparent colour.
    gray = np.arange(256, dtype=np.uint32) * 0x010101 | 0xFF000000
    for layer, pixels, colors in (("class", layers.label, expected), ("confidence", layers.confidence, gray)):
        uri = jvm.java_class("java.io.File")(str(found.path(layer))).toURI()
        server = servers.buildServer(uri)
        assert (server.getWidth(), server.getHeight(), server.nResolutions()) == (*MAP, 3)
        assert server.nChannels() in (1, 3)
        # An old OpenSlide passes on no TIFF's pixel size.
        if control.getPixelCalibration().hasPixelSizeMicrons():
            assert float(server.getPixelCalibration().getAveragedPixelSizeMicrons()) == pytest.approx(2.0)
        whole = server.readRegion(request.createInstance(server.getPath(), 1.0, 0, 0, *MAP))
        np.testing.assert_array_equal(argb(whole), colors[pixels])
        half = server.readRegion(request.createInstance(server.getPath(), 2.0, 0, 0, *MAP))
        assert (half.getWidth(), half.getHeight()) == (350, 450)
        server.close()


WORLD = """
interface Entry { String getID() }
interface Place { java.nio.file.Path getPath() }
class World {
    def entry, project, options, overlay
    def getCurrentViewer() { this }
    def getProjectEntry() { entry }
    def getProject() { project }
    def getOverlayOptions() { options }
    int getZPosition() { 0 }
    int getTPosition() { 0 }
    void setCustomPixelLayerOverlay(given) { overlay = given }
    void runLater(Closure action) { action() }
}
def world = new World(
    entry: [getID: { "7" }] as Entry,
    project: [getPath: { new File(folder, "project.qpproj").toPath() }] as Place,
    options: new qupath.lib.gui.viewer.OverlayOptions())
"""
PAINT = """
def picture = new BufferedImage(width as int, height as int, BufferedImage.TYPE_INT_ARGB)
def graphics = picture.createGraphics()
graphics.scale(1 / scale, 1 / scale)
graphics.translate(-x, -y)
world.overlay.paintOverlay(graphics, ImageRegion.createInstance(0, 0, 100000, 100000, 0, 0), scale, null, true)
return picture
"""


def painted(project: Path, layer: str, box: Box, scale: float, *, largest: int = 6000) -> NDArray[np.uint32]:
    """What QuPath's overlay paints over `box` at `scale`, after the script has run in a stand-in of its window."""
    jvm.start_qupath()
    jpype = pytest.importorskip("jpype")
    try:
        shell = jpype.JClass("groovy.lang.GroovyShell")()
        jpype.JClass("qupath.lib.gui.viewer.overlays.BufferedImageOverlay")
    except TypeError:
        pytest.skip("this QuPath is its core alone, without a window")
    script = text("show_score_map.groovy")
    for old, new in (
        ("import javafx.application.Platform\n", ""),
        ("import qupath.lib.gui.scripting.QPEx\n", ""),
        ("Platform.runLater", "world.runLater"),
        ("QPEx.", "world."),
        ('layer = "class"', f'layer = "{layer}"'),
        ("largest = 6000", f"largest = {largest}"),
    ):
        assert old in script
        script = script.replace(old, new)
    lines = script.splitlines()
    imports = [line for line in lines if line.startswith("import ")]
    body = [line for line in lines if not line.startswith("import ")]
    given = {"folder": str(project), "width": box.width / scale, "height": box.height / scale, "x": box.x, "y": box.y}
    for name, value in {**given, "scale": scale}.items():
        shell.setVariable(name, value)
    return argb(shell.evaluate("\n".join([*imports, WORLD, *body, PAINT])))


@qupath
@pytest.mark.parametrize(("downsample", "corner"), [(4.0, (0, 0)), (8.0, (1000, 2400)), (3.97, (0, 0))])
def test_the_script_paints_each_map_pixel_where_it_belongs(
    tmp_path: Path, downsample: float, corner: tuple[int, int]
) -> None:
    found, layers = a_map(tmp_path / "darefine" / "maps" / "7", downsample=downsample, corner=corner)
    step = found.box.width / MAP.width
    whole = painted(tmp_path, "class", found.box, step)
    np.testing.assert_array_equal(whole[:900, :700], class_colors()[layers.label])
    # Four pixels of the picture for every one of the map: borders lie where they do, not half a pixel beside.
    part = painted(tmp_path, "class", Box(corner[0], corner[1], 800, 800), step / 2)
    twice = class_colors()[layers.label].repeat(2, axis=0).repeat(2, axis=1)
    if downsample.is_integer():
        np.testing.assert_array_equal(part, twice[: part.shape[0], : part.shape[1]])


@qupath
def test_the_script_paints_scores_in_grey_and_leaves_glass_clear(tmp_path: Path) -> None:
    found, layers = a_map(tmp_path / "darefine" / "maps" / "7")
    gray = np.arange(256, dtype=np.uint32) * 0x010101 | 0xFF000000
    gray[0] = 0
    np.testing.assert_array_equal(painted(tmp_path, "confidence", found.box, 8.0), gray[layers.confidence])


@qupath
def test_the_script_paints_a_large_map_from_its_pyramid(tmp_path: Path) -> None:
    found, layers = a_map(tmp_path / "darefine" / "maps" / "7")
    pixels = painted(tmp_path, "class", found.box, 8.0, largest=500)
    colors = class_colors()
    shown = np.full(pixels.shape, 3, np.uint8)
    for label in range(3):
        shown[pixels == colors[label]] = label
    truth = np.where(layers.label == 255, 3, layers.label)
    # Two map pixels are one here: what is shown must be there within one such pixel.
    for label in range(4):
        around = np.lib.stride_tricks.sliding_window_view(np.pad(truth == label, 2), (5, 5))
        near = around.any((-2, -1))
        assert near[shown == label].all()
    assert (shown == truth).mean() > 0.97
