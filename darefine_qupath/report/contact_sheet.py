"""Draw a contact sheet of tiles: what the network will see, on one page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from darefine_qupath.errors import TileError
from darefine_qupath.report.drawing import draw_box, draw_text, find_borders
from darefine_qupath.tiles.index import TileIndex, TileRecord
from darefine_qupath.tiles.slide_reader import TilePixels, TileReader
from darefine_qupath.tiles.storage import IGNORE_COLOR, palette

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["check_sheet", "choose_examples", "contact_sheet"]

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}

_SIDE = 220
_GAP = 6
_LINE = 18
_MARGIN = 24
_TEXT = 13
"""Size of the text, in pixels."""
_BOX_COLOR = (0, 200, 255)


def choose_examples(tiles: TileIndex, number: int, *, seed: int = 0) -> NDArray[np.int64]:
    """Choose tiles to look at: every class in turn, rarest first, each time one that shows much of it.

    Parameters
    ----------
    tiles : TileIndex
        All tiles.
    number : int
        How many.
    seed : int, optional
        Which.

    Returns
    -------
    ndarray of int64
        Positions in `tiles`, none twice.
    """
    rng = np.random.default_rng(seed)
    pixels = tiles.counts[:, :-1]
    labels = [int(label) for label in np.argsort(pixels.sum(axis=0), kind="stable") if pixels[:, label].any()]
    chosen: list[int] = []
    for turn in range(min(number, len(tiles))):
        weight = pixels[:, labels[turn % len(labels)]].astype(np.float64)
        weight[chosen] = 0
        if not weight.any():
            weight = np.ones(len(tiles))
            weight[chosen] = 0
        chosen.append(int(rng.choice(len(tiles), p=weight / weight.sum())))
    return np.array(chosen, np.int64)


def check_sheet(path: Path) -> str:
    """Tell the picture format of a contact sheet by the suffix of its file.

    Raises
    ------
    TileError
        If it is none that can be drawn, or the folder is not there: before any work is done.
    """
    if path.suffix.lower() not in _FORMATS:
        raise TileError(f"A contact sheet is one of {', '.join(_FORMATS)}, not {path.suffix!r}; rename {path}")
    if not path.parent.is_dir():
        raise TileError(f"There is no folder {path.parent} for the contact sheet {path.name}; make it first")
    return _FORMATS[path.suffix.lower()]


def contact_sheet(
    tiles: TileIndex, reader: TileReader, path: Path, *, number: int = 12, columns: int = 2, seed: int = 0
) -> Path:
    """Draw examples of slice, mask and context, with a table of the classes.

    The slice is drawn with the outlines of its mask, the context with the slice's box.

    Parameters
    ----------
    tiles : TileIndex
        All tiles; the table counts them all.
    reader : TileReader
        Where their pixels are.
    path : Path
        PNG or JPEG to write.
    number : int, optional
        Examples.
    columns : int, optional
        Examples side by side.
    seed : int, optional
        Which examples.

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    TileError
        If there are no tiles, or the file cannot be of that kind; see `check_sheet`.
    """
    kind = check_sheet(path)
    if not len(tiles):
        raise TileError("There are no tiles to show")
    examples = [tiles[int(index)] for index in choose_examples(tiles, number, seed=seed)]
    columns = min(columns, len(examples))
    cell = (3 * _SIDE + 2 * _GAP + _MARGIN, _SIDE + _LINE + _MARGIN)
    rows = -(-len(examples) // columns)
    table = (tiles.classes.num_classes + 4) * _LINE
    sheet = Image.new("RGB", (columns * cell[0] + _MARGIN, rows * cell[1] + table + 2 * _MARGIN), "white")
    colors = palette(tiles.classes)
    for place, record in enumerate(examples):
        corner = (_MARGIN + place % columns * cell[0], _MARGIN + place // columns * cell[1])
        _draw_tile(sheet, corner, record, reader.read(record), colors, tiles.classes.names)
    _draw_table(sheet, (_MARGIN, _MARGIN + rows * cell[1]), tiles)
    sheet.save(path, kind, **({"quality": 92} if kind == "JPEG" else {}))
    return path


def _draw_tile(
    sheet: Image.Image,
    corner: tuple[int, int],
    record: TileRecord,
    pixels: TilePixels,
    colors: bytes,
    names: tuple[str, ...],
) -> None:
    x, y = corner
    draw = ImageDraw.Draw(sheet)
    box = record.pair.slice
    title = f"{record.image.name}  x {box.x}  y {box.y}   {_contents(record, names)}"
    draw_text(draw, (x, y), title, size=_TEXT, width=3 * _SIDE)
    y += _LINE
    mask = Image.fromarray(pixels.mask)
    mask.putpalette(colors)
    outlined = _outlined(Image.fromarray(pixels.slice), mask)
    for picture in (outlined, mask.convert("RGB"), Image.fromarray(pixels.context)):
        shown = picture.resize((_SIDE, _SIDE), Image.Resampling.BOX)
        sheet.paste(shown, (x, y))
        draw.rectangle((x - 1, y - 1, x + _SIDE, y + _SIDE), outline=(160, 160, 160))
        x += _SIDE + _GAP
    x -= _SIDE + _GAP
    scale = _SIDE / record.spec.context_px
    left, top = x + (box.x - record.pair.context.x) * scale, y + (box.y - record.pair.context.y) * scale
    side = record.spec.slice_px * scale
    draw.rectangle((left, top, left + side, top + side), outline=_BOX_COLOR, width=2)


def _contents(record: TileRecord, names: tuple[str, ...]) -> str:
    """Share of each class in the mask, the largest first."""
    total = sum(record.counts) + record.ignored
    parts = sorted(zip((*record.counts, record.ignored), (*names, "ignored"), strict=True), reverse=True)
    return ", ".join(f"{name} {count / total:.0%}" for count, name in parts if count >= 0.005 * total)


def _outlined(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """Draw where the labels of a mask change, in the color of the label, over its slice; as large as it is shown."""
    labels = mask.resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
    shown = picture.resize((_SIDE, _SIDE), Image.Resampling.BOX)
    shown.paste(labels.convert("RGB"), mask=Image.fromarray(find_borders(np.asarray(labels))))
    return shown


def _draw_table(sheet: Image.Image, corner: tuple[int, int], tiles: TileIndex) -> None:
    x, y = corner
    draw = ImageDraw.Draw(sheet)
    spec = tiles.spec
    slice_side, context_side = (
        (f"{spec.slice_um:g} um", f"{spec.context_um:g} um")
        if spec.is_physical
        else (f"{spec.slice_px} px", f"{spec.context_px} px")
    )
    title = f"{len(tiles)} tiles of {len(tiles.images)} images: slice of {slice_side}, mask, context of {context_side}"
    draw_text(draw, (x, y), title, size=_TEXT)
    offsets = (26, 240, 340, 480, 600)
    lines: list[tuple[str, ...]] = [("class", "tiles", "pixels", "share", "images")]
    labelled = max(1, int(tiles.class_pixels.sum()))
    for label, name in enumerate(tiles.classes.names):
        pixels, number = int(tiles.class_pixels[label]), int(tiles.class_tiles[label])
        images = len(np.unique(tiles.image[tiles.counts[:, label] > 0]))
        lines.append((name, str(number), f"{pixels:,}", f"{pixels / labelled:.1%}", str(images)))
    ignored = tiles.counts[:, -1]
    images = len(np.unique(tiles.image[ignored > 0]))
    lines.append(("(ignored)", str(int((ignored > 0).sum())), f"{int(ignored.sum()):,}", "", str(images)))
    for row, line in enumerate(lines):
        top = y + (row + 1.3) * _LINE
        if row:
            color = (*tiles.classes.colors, IGNORE_COLOR)[row - 1]
            draw_box(draw, (x, top), color, side=13)
        for offset, text in zip(offsets, line, strict=True):
            draw_text(draw, (x + offset, top), text, size=_TEXT)
