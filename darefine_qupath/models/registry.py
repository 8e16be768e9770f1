"""Register networks, encoders and fusions by name, those of other packages too.

A name that is registered can stand in ``darefine.toml``, on the command line and in a model file. The package registers
its own parts the same way, at the end of the file that defines them; see "How to add a network" in
``docs/developing.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import nn

from darefine_qupath.errors import ModelError

__all__ = [
    "ENCODERS",
    "FUSIONS",
    "NETWORKS",
    "ContextView",
    "EncoderEntry",
    "FusionEntry",
    "FusionStage",
    "NetworkEntry",
    "Registry",
    "load_plugins",
    "register_encoder",
    "register_fusion",
    "register_network",
]

T = TypeVar("T")

ContextView = Literal["map", "pooled", "crop"]
"""What a fusion takes from the context at a scale: the whole feature at the slice's size, its average, or the part of
it where the slice lies."""


class Registry(Mapping[str, T]):
    """Parts of one kind by name, in the order of their registration.

    Parameters
    ----------
    kind : str
        What the parts are, for messages.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str, entry: T) -> None:
        """Add a part.

        Raises
        ------
        ModelError
            If there is one of this name.
        """
        if name in self._entries:
            raise ModelError(f"The {self._kind} {name!r} is registered already; choose another name")
        self._entries[name] = entry

    def __getitem__(self, name: str) -> T:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkEntry:
    """A registered network; see `register_network`."""

    build: Callable[[Any], nn.Module]
    title: str
    encoders: tuple[str, ...]
    fuses_context: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderEntry:
    """A registered encoder; see `register_encoder`."""

    build: Callable[[], nn.Module]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    imagenet_file: Callable[[], Path] | None


@dataclass(frozen=True, slots=True)
class FusionStage:
    """How slice and context are fused at one scale.

    Attributes
    ----------
    build : callable
        ``build(inputs, width)`` gives the module: `inputs` is the sum of the channels it is given, `width` the channels
        of its output. It is called with the slice's feature, the previous output (not at 1/32) and the views of the
        context, in this order.
    context : tuple of {"map", "pooled", "crop"}
        The views of the context.
    """

    build: Callable[[int, int], nn.Module]
    context: tuple[ContextView, ...]

    @property
    def needs_map(self) -> bool:
        """Whether it needs the context's feature pixel by pixel."""
        return "map" in self.context or "crop" in self.context


@dataclass(frozen=True, kw_only=True, slots=True)
class FusionEntry:
    """A registered fusion; see `register_fusion`."""

    coarsest: FusionStage
    finer: FusionStage
    without_context: FusionEntry | None

    @property
    def uses_box(self) -> bool:
        """Whether it looks at the part of the context where the slice lies."""
        return "crop" in (*self.coarsest.context, *self.finer.context)

    def stage(self, step: int) -> FusionStage:
        """Return how it fuses at a scale, counted from the coarsest."""
        return self.finer if step else self.coarsest


NETWORKS: Registry[NetworkEntry] = Registry("network")
ENCODERS: Registry[EncoderEntry] = Registry("encoder")
FUSIONS: Registry[FusionEntry] = Registry("fusion")


def register_network(
    name: str,
    build: Callable[[Any], nn.Module],
    *,
    title: str,
    encoders: tuple[str, ...] = ("slice",),
    fuses_context: bool = False,
) -> None:
    """Register a network.

    Parameters
    ----------
    name : str
        For settings and model files.
    build : callable
        Takes a `ModelConfig` and gives a `SegmentationNetwork`, such as its class. Prediction folds a batch norm into
        the convolution that is registered right before it, whose output it must normalize.
    title : str
        For people.
    encoders : tuple of str
        Which encoders of the configuration it builds: ``"slice"``, ``"context"``.
    fuses_context : bool
        Whether it looks at the context where the configuration has ``input = "dual"``.
    """
    NETWORKS.register(name, NetworkEntry(build=build, title=title, encoders=encoders, fuses_context=fuses_context))


def register_encoder(
    name: str,
    build: Callable[[], nn.Module],
    *,
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
    std: tuple[float, float, float] = (0.229, 0.224, 0.225),
    imagenet_file: Callable[[], Path] | None = None,
) -> None:
    """Register an encoder.

    Parameters
    ----------
    name : str
        For settings and model files.
    build : callable
        Gives an `Encoder` with random weights.
    mean, std : tuple of float
        Normalisation its pretrained weights want, per channel, where 1 is white; ImageNet's by default.
    imagenet_file : callable, optional
        Gives the file with its ImageNet weights, or raises a ModelError that says what to install.
    """
    ENCODERS.register(name, EncoderEntry(build=build, mean=mean, std=std, imagenet_file=imagenet_file))


def register_fusion(
    name: str, *, coarsest: FusionStage, finer: FusionStage, without_context: str | None = None
) -> None:
    """Register a way in which slice and context are fused in DA-RefineNet.

    Parameters
    ----------
    name : str
        For settings and model files.
    coarsest, finer : FusionStage
        At 1/32, where there is no previous output, and at 1/16, 1/8 and 1/4.
    without_context : str, optional
        The fusion that stands in its place in a network without a context; itself by default.
    """
    other = None if without_context is None else FUSIONS[without_context]
    FUSIONS.register(name, FusionEntry(coarsest=coarsest, finer=finer, without_context=other))


def load_plugins() -> None:
    """Import the packages that register networks, encoders or fusions: those with an entry point ``darefine.models``.

    Raises
    ------
    ModelError
        If one cannot be imported.
    """
    for plugin in entry_points(group="darefine.models"):
        try:
            plugin.load()
        except ImportError as error:
            raise ModelError(
                f"The package {plugin.value}, which adds networks to darefine, cannot be imported ({error}); mend or "
                "uninstall it"
            ) from error
