"""Lay finished cells out as the paper's Tables I and II, with differences between networks seed by seed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from darefine_qupath.errors import ConfigError
from darefine_qupath.experiments.networks import COMPARED, CONTEXTS, DECODERS, NETWORKS, TABLE_ONE, TABLE_TWO
from darefine_qupath.filesystem import atomic_write
from darefine_qupath.models import ENCODERS

__all__ = ["read_cells", "write_json", "write_tables"]


def write_json(path: Path, data: Any) -> None:  # noqa: ANN401 - any JSON value
    """Write a JSON file whole or not at all."""
    with atomic_write(path, ConfigError) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def read_cells(out: Path) -> list[dict[str, Any]]:
    """Every finished cell."""
    return [json.loads(file.read_text("utf-8")) for file in sorted((out / "cells").glob("*.json"))]


def write_tables(out: Path, settings: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> str:
    """Lay the cells out as the paper does, as Markdown and as JSON; returns the Markdown."""
    if not cells:
        raise ConfigError(f"{out} has no finished cell yet; run without --tables")
    rows = rows_of(cells)
    # The bars are set for the generated slides alone.
    pairs = [(one, two, note) for one, two, note in COMPARED if settings["data"] != "project" or "bar" not in note]
    pairs += [(one, two, "") for one, two, note in COMPARED if settings["data"] == "project" and "bar" in note]
    differences = [found for pair in pairs for found in difference(rows, *pair)]
    parts = (header(settings, cells), table_one(rows), table_two(rows), compared(differences), context(rows))
    text = "\n".join(chain.from_iterable(parts))
    write_json(
        out / "tables.json",
        {"settings": settings, "rows": [row.to_json() for row in rows], "differences": differences},
    )
    with atomic_write(out / "tables.md", ConfigError) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return text


@dataclass(frozen=True, kw_only=True)
class Row:
    """One network with one slice encoder: its cells by seed."""

    network: str
    encoder: str
    cells: Mapping[int, Mapping[str, Any]]

    @property
    def first(self) -> Mapping[str, Any]:
        """Any of its cells, for what all have in common."""
        return next(iter(self.cells.values()))

    @property
    def classes(self) -> list[str]:
        """Class names in label order."""
        return list(self.first["scores"]["normal"]["iou"])

    def values(self, metric: str, mode: str = "normal") -> dict[int, float]:
        """Give a metric in percent by seed, ``iou/NAME`` for a class; without the seeds in which it is not defined."""
        found = {}
        for seed, cell in self.cells.items():
            value = cell["scores"].get(mode)
            for part in metric.split("/", 1):
                value = None if value is None else value[part]
            if value is not None:
                found[seed] = 100 * value
        return found

    def to_json(self) -> dict[str, Any]:
        """Mean and spread of every metric."""
        metrics = ["miou", *(f"iou/{name}" for name in self.classes), "accuracy", "bach_score"]
        return {
            "network": self.network,
            "encoder": self.encoder,
            "seeds": sorted(self.cells),
            "parameters": self.first["parameters"],
            "metrics": {metric: summary(self.values(metric)) for metric in metrics},
            "miou_blank_context": summary(self.values("miou", "blank")),
            "miou_shuffled_context": summary(self.values("miou", "shuffled")),
        }


def rows_of(cells: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Cells by network and encoder, in the order of `NETWORKS` and of the encoders' sizes."""
    keys = sorted(
        {(cell["encoder"], cell["network"]) for cell in cells},
        key=lambda key: (list(ENCODERS).index(key[0]), list(NETWORKS).index(key[1])),
    )
    return [
        Row(
            network=network,
            encoder=encoder,
            cells={c["seed"]: c for c in cells if (c["encoder"], c["network"]) == (encoder, network)},
        )
        for encoder, network in keys
    ]


def summary(values: Mapping[int, float]) -> dict[str, Any]:
    """Mean, standard deviation of the sample, and the values by seed."""
    found = list(values.values())
    return {
        "mean": statistics.fmean(found) if found else None,
        "sd": statistics.stdev(found) if len(found) > 1 else None,
        "by_seed": {str(seed): value for seed, value in sorted(values.items())},
    }


def difference(rows: Sequence[Row], better: str, worse: str, note: str) -> Iterator[dict[str, Any]]:
    """MIoU of one network less that of another, seed by seed, for each encoder that both have."""
    for mine in rows:
        for other in rows:
            if (mine.network, other.network) == (better, worse) and mine.encoder == other.encoder:
                a, b = mine.values("miou"), other.values("miou")
                paired = {seed: a[seed] - b[seed] for seed in a if seed in b}
                if paired:
                    yield {"better": better, "worse": worse, "encoder": mine.encoder, "note": note, **summary(paired)}


def header(settings: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say what was done, on what, with what."""
    tiles, first = cells[0]["tiles"], cells[0]
    spec, recipe = tiles["spec"], first["recipe"]
    unit = "um" if spec["slice_um"] is not None else "px"
    pretrained = "ImageNet weights" if "efficientnet-lite0" in {cell["encoder"] for cell in cells} else "random weights"
    extra = "".join(f", {key} = {value}" for key, value in settings["set"].items())
    if settings["data"] == "project":
        where = f"Project `{settings['project']}`, measured on " + (
            f"the images {', '.join(settings['held_out'])}." if settings["held_out"] else "other places of its slides."
        )
    else:
        where = (
            f"{settings['slides']} generated slides of {settings['side']} px to learn from, "
            f"{settings['held_out_slides']} of other seeds to measure on."
        )
    return [
        f"{where} {tiles['learned']} tiles to learn from, {tiles['measured']} to measure on; slices of "
        f"{spec[f'slice_{unit}']:g} {unit} in contexts of {spec[f'context_{unit}']:g} {unit}, both seen at "
        f"{spec['input_px']} px.",
        "",
        f"Every network alike: {settings['steps']} steps of {settings['batch']} tiles, preset `{recipe['preset']}`"
        f"{extra}, decoder width {settings['width']}; encoders start from {pretrained}, U-Net always from random ones. "
        f"Measured once, after the last step. Percent, mean ± standard deviation over the seeds "
        f"({', '.join(str(seed) for seed in sorted({cell['seed'] for cell in cells}))}). {first['hardware']}.",
        "",
    ]


def spread(values: Mapping[int, float], sign: str = "") -> str:
    """Mean and standard deviation for people."""
    found = summary(values)
    if found["mean"] is None:
        return "-"
    sd = "" if found["sd"] is None else f" ± {found['sd']:.1f}"
    return f"{found['mean']:{sign}.1f}{sd}"


def metrics_of(row: Row) -> list[str]:
    """Columns that both of the paper's tables have."""
    metrics = ["miou", *(f"iou/{name}" for name in row.classes), "accuracy", "bach_score"]
    return [spread(row.values(metric)) for metric in metrics]


def markdown(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay out a table."""
    if not rows:
        return []
    lines = [[*columns], *([*row] for row in rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(columns))]
    laid = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    return [f"**{title}**", "", laid[0], "| " + " | ".join("-" * width for width in widths) + " |", *laid[1:], ""]


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Heads of the columns of `metrics_of`."""
    return ["mIoU", *(f"IoU {name}" for name in rows[0].classes), "Accuracy", "Score"]


def table_one(rows: Sequence[Row]) -> list[str]:
    """Table I: single input, the slice in two sizes, slice and context."""
    body = []
    for network in TABLE_ONE:
        for row in rows:
            if row.network == network:
                label = "Our dual-inputs" if network == "add" else NETWORKS[network].label
                encoder = "U-Net" if network == "unet" else row.encoder
                decoder = DECODERS.get(network, "Add-Refine")
                size = f"{row.first['parameters'] / 1e6:.1f}M"
                body.append([encoder, decoder, label, *metrics_of(row), size, str(len(row.cells))])
    columns = ["Encoder", "Decoder", "Input", *columns_of(rows), "Parameters", "Seeds"]
    return markdown("Table I. Dual inputs and single input", columns, body)


def table_two(rows: Sequence[Row]) -> list[str]:
    """Table II: ways to join slice and context."""
    body = [
        [encoders(row), NETWORKS[network].label, *metrics_of(row), str(len(row.cells))]
        for network in TABLE_TWO
        for row in rows
        if row.network == network
    ]
    columns = ["Dual-inputs encoder", "Fusion strategy", *columns_of(rows), "Seeds"]
    return markdown("Table II. Ways to join slice and context", columns, body)


def encoders(row: Row) -> str:
    """Slice encoder and context encoder."""
    return f"{row.encoder} + {row.first['model']['context_encoder']}"


def compared(differences: Sequence[Mapping[str, Any]]) -> list[str]:
    """Differences of mIoU in points, seed by seed."""
    body = [
        [
            f"{found['better']} - {found['worse']}" + (f" ({found['note']})" if found["note"] else ""),
            found["encoder"],
            spread({int(seed): value for seed, value in found["by_seed"].items()}, "+"),
            f"{min(found['by_seed'].values()):+.1f} to {max(found['by_seed'].values()):+.1f}",
            str(len(found["by_seed"])),
        ]
        for found in differences
    ]
    return markdown("Differences of mIoU, seed by seed", ["", "Encoder", "Points", "Range", "Seeds"], body)


def context(rows: Sequence[Row]) -> list[str]:
    """MIoU with each tile's context, an empty one, and that of another tile."""
    body = [
        [encoders(row), NETWORKS[row.network].label, *(spread(row.values("miou", mode)) for mode in CONTEXTS)]
        for row in rows
        if row.values("miou", "blank")
    ]
    columns = ["Encoder", "Network", "mIoU", "with blank contexts", "with foreign contexts"]
    return markdown("Does a network use its context?", columns, body)
