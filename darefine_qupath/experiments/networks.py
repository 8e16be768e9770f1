"""List the networks that the paper compares, and what is compared with what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from darefine_qupath.training import ContextMode

__all__ = ["COMPARED", "CONTEXTS", "DECODERS", "NETWORKS", "TABLE_ONE", "TABLE_TWO", "Network"]

CONTEXTS: tuple[ContextMode, ...] = ("normal", "blank", "shuffled")
"""With which contexts a trained network is measured: each tile's own, empty ones, those of other tiles."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """A row of the tables: what is changed in the network and in the recipe."""

    label: str
    model: Mapping[str, Any]
    train: Mapping[str, Any] = field(default_factory=dict)


NETWORKS = {
    "unet": Network(label="Single-input", model={"network": "unet"}),
    "refinenet": Network(label="Single-input", model={"network": "refinenet"}),
    "single": Network(label="Single-input", model={"input": "single", "fusion": "add"}),
    "multisize": Network(label="Multi-size dual-inputs", model={"input": "multisize", "fusion": "add"}),
    "add": Network(label="Add", model={"fusion": "add"}),
    "concat": Network(label="Concat", model={"fusion": "concat"}),
    "attention": Network(label="Attention", model={"fusion": "attention"}),
    "aligned": Network(label="Aligned (not in the paper)", model={"fusion": "aligned"}),
    "no-context-dropout": Network(
        label="Attention, no context dropout", model={"fusion": "attention"}, train={"context_dropout": 0.0}
    ),
}
TABLE_ONE = ("unet", "refinenet", "single", "multisize", "add")
TABLE_TWO = ("concat", "add", "attention", "aligned")
DECODERS = {"unet": "U-Net", "refinenet": "RefineNet"}
COMPARED = (
    ("attention", "single", "bar: 15"),
    ("attention", "multisize", "bar: 10"),
    ("add", "single", "same decoder, with and without context"),
    ("attention", "add", ""),
    ("attention", "concat", ""),
    ("aligned", "single", ""),
    ("aligned", "attention", ""),
)
