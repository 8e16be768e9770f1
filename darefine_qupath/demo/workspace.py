"""Make a QuPath project of generated slides: annotated ones to learn from, bare ones to predict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from darefine_qupath.demo.slides import CLASSES, MPP, draw_slide
from darefine_qupath.errors import ProjectError
from darefine_qupath.exchange import write_geojson
from darefine_qupath.project import Changes, create_project

__all__ = ["DemoProject", "make_project"]

SETTINGS = """\
# Settings of darefine for this project; `darefine train --help` names what the command line can change.

[classes]
names = ["Normal", "Benign", "In situ", "Invasive"]
# Everything outside the annotations is Normal here. In a sparsely annotated project leave this at "ignore".
unlabelled = "Normal"

[tiles]
# A slice of {slice_um} um with its context of {context_um} um, both seen at {input_px} x {input_px} pixels.
input_px = {input_px}
slice_um = {slice_um}
context_um = {context_um}
stride_um = {stride_um}

[model]
slice_encoder = "resnet18"
context_encoder = "resnet18"
fusion = "attention"
# Decoder channels, twice that at 1/32; 256 in the paper.
width = 64

[train]
# A few minutes on two cores. The paper's schedule is preset = "paper".
preset = "modern"
epochs = 5
batch_size = 8
samples_per_epoch = 480
validate_every = 5
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoProject:
    """A generated project.

    Attributes
    ----------
    path : Path
        Its ``project.qpproj``.
    truth : Path
        Folder with one GeoJSON per held-out slide, named by entry id: what a perfect prediction would draw.
    train, test : tuple of str
        Image names.
    """

    path: Path
    truth: Path
    train: tuple[str, ...]
    test: tuple[str, ...]


def make_project(
    folder: Path,
    *,
    num_train: int = 4,
    num_test: int = 1,
    size: tuple[int, int] = (6144, 6144),
    seed: int = 1,
    quality: int = 85,
    progress: Callable[[str], None] | None = None,
) -> DemoProject:
    """Draw slides and make a QuPath project of them.

    The truth of the held-out slides stays outside the project, so that QuPath shows what was predicted there and
    nothing else.

    Parameters
    ----------
    folder : Path
        New or empty folder.
    num_train, num_test : int
        Slides with and without annotations.
    size : tuple of int
        Width and height of each, in pixels.
    seed : int
        Of the first slide; the next ones count up.
    quality : int
        JPEG quality of the slides.
    progress : callable, optional
        Told the name of each finished slide.

    Returns
    -------
    DemoProject
        Where everything lies.

    Raises
    ------
    ProjectError
        If the folder is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ProjectError(f"{folder} is not empty; name a new folder for the generated project")
    slides, truth = folder / "slides", folder / "truth"
    for each in (slides, truth):
        each.mkdir(parents=True, exist_ok=True)
    names: dict[str, list[str]] = {"train": [], "test": []}
    with create_project(folder, classes=CLASSES, engine="embedded") as project:
        for number in range(num_train + num_test):
            role = "train" if number < num_train else "test"
            drawn = draw_slide(slides / f"{role}-{number + 1}.tif", seed=seed + number, size=size, quality=quality)
            image = project.add_image(drawn.path, mpp=MPP, metadata={"darefine.role": "test"} if role == "test" else {})
            if role == "train":
                project.apply(image, Changes(add=drawn.annotations))
            else:
                write_geojson(drawn.annotations, truth / f"{image.id}.geojson")
            names[role].append(image.name)
            if progress is not None:
                progress(image.name)
        path = project.path
    (folder / "darefine.toml").write_text(
        SETTINGS.format(input_px=128, slice_um=128, context_um=640, stride_um=128), encoding="utf-8"
    )
    return DemoProject(path=path, truth=truth, train=tuple(names["train"]), test=tuple(names["test"]))
