"""Choose the images of a project that take part, and say why others cannot."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from darefine_qupath.annotations import NOBODY, Annotation, annotator_of, annotators_in, class_counts
from darefine_qupath.classes import ClassMap
from darefine_qupath.errors import DarefineError, ProjectError, SlideError, TileError
from darefine_qupath.geometry import PixelSize
from darefine_qupath.limits import wording
from darefine_qupath.masks import count_unlearnable, unlearnable_words
from darefine_qupath.pipeline.settings import Settings
from darefine_qupath.project import ImageEntry, Project, image_titles
from darefine_qupath.slides import open_slide
from darefine_qupath.tiles.sources import TileSource

__all__ = [
    "OVERLAP",
    "Skipped",
    "TrainingSet",
    "check_annotators",
    "choose_images",
    "collect_training_images",
    "every_annotation",
    "size_mismatch",
    "source_of",
    "warn_of_several_annotators",
    "warn_of_unlearnable_objects",
]

_log = logging.getLogger(__name__)

OVERLAP = "where they overlap, the smaller shape counts; --annotator NAME chooses"

AnnotationsOf = Callable[[Project, ImageEntry], Sequence[Annotation]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """An image that cannot take part.

    Attributes
    ----------
    id : str
        Entry id.
    name : str
        As shown in QuPath.
    why : str
        The reason, as a clause.
    """

    id: str
    name: str
    why: str

    @classmethod
    def of(cls, image: ImageEntry, why: object) -> Skipped:
        """Record why an image is skipped."""
        return cls(id=image.id, name=image.name, why=str(why))

    def to_json(self) -> dict[str, str]:
        """Return plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """What there is to learn from.

    Attributes
    ----------
    classes : ClassMap
        The training classes.
    sources : tuple of TileSource
        Annotated images whose pixels can be read, test images included.
    skipped : tuple of Skipped
        Annotated images that cannot be read.
    """

    classes: ClassMap
    sources: tuple[TileSource, ...]
    skipped: tuple[Skipped, ...]


def check_annotators(annotations: Iterable[Annotation], annotators: Sequence[str]) -> None:
    """Refuse an annotator who drew nothing: a misspelt name would choose nothing.

    Parameters
    ----------
    annotations : iterable of Annotation
        Of all images; not looked at without names.
    annotators : sequence of str
        Names to choose by, `NOBODY` for what has none.

    Raises
    ------
    ProjectError
        If none of the annotations is by one of them.
    """
    if not annotators:
        return
    known = {annotator_of(record) or NOBODY for record in annotations}
    unknown = [name for name in annotators if name not in known]
    if unknown:
        raise ProjectError(
            f"There are no annotations by {', '.join(map(repr, unknown))}; annotators are "
            f"{', '.join(sorted(known)) or 'none'} "
            f"({NOBODY} stands for annotations without one)"
        )


def every_annotation(project: Project, images: Iterable[ImageEntry]) -> Iterator[Annotation]:
    """Annotations of all images that can be read."""
    for image in images:
        with suppress(DarefineError), wording(ProjectError):
            yield from project.annotations(image)


def choose_images(project: Project, names: Sequence[str] = ()) -> tuple[tuple[ImageEntry, ...], tuple[Skipped, ...]]:
    """Images whose pixels can be read, and those that cannot.

    Parameters
    ----------
    names : sequence of str, optional
        Names or entry ids; all images by default.

    Returns
    -------
    tuple of ImageEntry
        Readable images.
    tuple of Skipped
        The others, with the reason.

    Raises
    ------
    ImageNotFoundError
        If a name is not in the project.
    """
    wanted = tuple(project.image(name) for name in names) if names else project.images
    chosen, skipped = [], []
    for image in wanted:
        why = _why_unreadable(image)
        if why is None:
            chosen.append(image)
        else:
            skipped.append(Skipped.of(image, why))
    return tuple(chosen), tuple(skipped)


def _why_unreadable(image: ImageEntry) -> str | None:
    if image.unsupported is not None:
        return image.unsupported
    if image.path is None:
        return f"its URI {image.uri} is not a file"
    if not image.exists:
        return f"its file {image.path} is missing"
    return None


def size_mismatch(image: ImageEntry, mpp: float | None = None) -> str | None:
    """Say why an image's file is not what QuPath annotated, or not what can be read; None where it is.

    Coordinates are level-0 pixels of the image as QuPath sees it: where the file opens with another size, they would
    lie elsewhere. Pixels that are not square are not resampled, and are not taken for square ones unless the user says
    so by an `mpp`.
    """
    assert image.path is not None
    try:
        with wording(SlideError), open_slide(image.path, crop_bounds=image.crop_bounds) as slide:
            size, by_file = slide.size, slide.pixel_size
    except SlideError as error:
        return str(error)
    if image.size is None or image.size == size:
        return _why_not_square(image, by_file) if mpp is None else None
    return (
        f"QuPath lists it as {image.width} x {image.height} px, but its file has {size.width} x {size.height}; "
        f"annotations would be misplaced"
    )


def _why_not_square(image: ImageEntry, by_file: PixelSize | None) -> str | None:
    by_project = image.pixel_size if image.pixel_size is not None and image.pixel_size.is_possible else None
    pixel = by_project or by_file
    if pixel is None or pixel.is_square:
        return None
    who = "QuPath's calibration" if by_project else "its file"
    return (
        f"its pixels are not square ({pixel} by {who}); resample the image to square pixels, correct the pixel size in "
        f"QuPath (Image tab), or give --mpp to treat them as square"
    )


def source_of(image: ImageEntry, annotations: Sequence[Annotation], mpp: float | None) -> TileSource:
    """Image and annotations as the tiles want them.

    Parameters
    ----------
    image : ImageEntry
        Readable, by `choose_images`.
    mpp : float or None
        Given by the user; goes over the project's, which goes over the file's.
    """
    if image.path is None:
        raise ProjectError(f"The image {image.name!r} has no file: its URI is {image.uri}")
    return TileSource(
        id=image.id,
        name=image.name,
        path=image.path,
        mpp=image.mpp if mpp is None else mpp,
        crop_bounds=image.crop_bounds,
        annotations=tuple(annotations),
        metadata=image.metadata,
    )


def collect_training_images(
    project: Project,
    settings: Settings,
    annotations_of: AnnotationsOf,
    *,
    names: Sequence[str] = (),
    mpp: float | None = None,
) -> TrainingSet:
    """Collect everything in a project that a network can learn from.

    Parameters
    ----------
    annotations_of : callable
        Gives the annotations of an image that count.

    Raises
    ------
    TileError
        If no readable image has an annotation.
    ClassMapError
        If an annotation has a class that the settings do not know.
    """
    wanted = tuple(project.image(name) for name in names) if names else project.images
    drawn, damaged = _read_annotations(project, wanted, annotations_of)
    annotated = [image.id for image in wanted if class_counts(drawn[image.id])]
    warn_of_unlearnable_objects([(image, drawn[image.id]) for image in wanted])
    warn_of_several_annotators(drawn.values())
    readable, skipped = choose_images(project, annotated) if annotated else ((), ())
    skipped = (*damaged, *skipped)
    if not readable:
        raise TileError(_explain_no_image(project, skipped))
    records = [record for image in readable for record in drawn[image.id]]
    counts = class_counts(record for record in records if record.kind == "annotation")
    classes = settings.class_map(project.classes, counts)
    classes.check(counts)
    given = settings.mpp if mpp is None else mpp
    wrong = {image.id: size_mismatch(image, given) for image in readable}
    skipped += tuple(Skipped.of(i, why) for i in readable if (why := wrong[i.id]) is not None)
    readable = tuple(image for image in readable if wrong[image.id] is None)
    if not readable:
        raise TileError(_explain_no_image(project, skipped))
    titles = image_titles({image.id: image.name for image in wanted})
    for left_out in skipped:
        _log.warning("%s is left out: %s", titles[left_out.id], left_out.why)
    if skipped:
        _log.warning("%d of %d annotated images are left out", len(skipped), len(skipped) + len(readable))
    sources = _join_cases_of_same_file([source_of(image, drawn[image.id], given) for image in readable])
    return TrainingSet(classes=classes, sources=sources, skipped=skipped)


def _read_annotations(
    project: Project, images: Sequence[ImageEntry], annotations_of: AnnotationsOf
) -> tuple[dict[str, tuple[Annotation, ...]], tuple[Skipped, ...]]:
    """Annotations by entry id, and the images whose data is damaged."""
    drawn: dict[str, tuple[Annotation, ...]] = {}
    damaged = []
    for image in images:
        drawn[image.id] = ()
        try:
            with wording(ProjectError):
                drawn[image.id] = tuple(annotations_of(project, image))
                class_counts(drawn[image.id])
        except DarefineError as error:
            damaged.append(Skipped.of(image, error))
    return drawn, tuple(damaged)


def warn_of_unlearnable_objects(drawn: Iterable[tuple[ImageEntry, Sequence[Annotation]]]) -> None:
    """Log, image by image, how many annotations give no label, and why."""
    for image, records in drawn:
        line = unlearnable_words(count_unlearnable(records, image.size))
        if line:
            _log.warning("%s: %s", image.name, line)


def warn_of_several_annotators(drawn: Iterable[Sequence[Annotation]]) -> None:
    """Log how many images have annotations of several people, of whom nobody chose."""
    found = [names for records in drawn if len(names := annotators_in(records)) > 1]
    if found:
        everyone = ", ".join(sorted(set().union(*found)))
        _log.warning("%d images have annotations of several annotators (%s); %s", len(found), everyone, OVERLAP)


def _join_cases_of_same_file(sources: Sequence[TileSource]) -> tuple[TileSource, ...]:
    """Give entries of the same file the same case: pixels must not both train and validate."""
    by_file: dict[Path, list[TileSource]] = {}
    for source in sources:
        by_file.setdefault(source.path.resolve(), []).append(source)
    cases = {}
    for path, same in by_file.items():
        named = next((source.known_case for source in same if source.known_case), str(path))
        cases.update({source.id: named for source in same if len(same) > 1})
    return tuple(replace(source, case=cases[source.id]) if source.id in cases else source for source in sources)


def _explain_no_image(project: Project, skipped: Sequence[Skipped]) -> str:
    if skipped:
        titles = image_titles({image.id: image.name for image in skipped})
        reasons = "; ".join(f"{titles[image.id]}: {image.why}" for image in skipped)
        return f"No annotated image of {project.path} can be read: {reasons}"
    return f"No image of {project.path} has an annotation with a class; draw some in QuPath and save"
