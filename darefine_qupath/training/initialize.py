"""Build the network of the first step: random, with encoders trained elsewhere, or an earlier model's."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from darefine_qupath.checkpoint.model_file import Checkpoint, load_checkpoint
from darefine_qupath.classes import ClassMap
from darefine_qupath.errors import ModelError, TrainingError
from darefine_qupath.models import (
    ModelConfig,
    SegmentationNetwork,
    build_model,
    load_encoder_weights,
    load_imagenet_weights,
)
from darefine_qupath.training.config import TrainConfig

__all__ = ["FrozenLayers", "check_start", "initial_network"]

_log = logging.getLogger(__name__)


def initial_network(
    model: ModelConfig, config: TrainConfig, classes: ClassMap, init_from: Path | None
) -> tuple[SegmentationNetwork, tuple[str, ...]]:
    """Build the network to start from.

    Parameters
    ----------
    model : ModelConfig
        What it is made of.
    config : TrainConfig
        `seed` and `encoder_weights` count.
    classes : ClassMap
        What its logits shall mean.
    init_from : Path or None
        A model file whose weights are taken; its classifier too, class by class, where the names are the same.

    Returns
    -------
    SegmentationNetwork
        In training mode, on the CPU.
    tuple of str
        Roles of the encoders that come trained.

    Raises
    ------
    TrainingError
        If the earlier model is another network.
    ModelError
        If encoder weights were asked for and are not there or do not fit.
    CheckpointError
        If `init_from` is no model file.
    """
    network = build_model(model, seed=config.seed)
    if init_from is not None:
        _copy_weights(network, classes, init_from)
        return network, tuple(network.encoders)
    return network, _load_pretrained(network, config.encoder_weights)


def check_start(model: ModelConfig, config: TrainConfig, init_from: Path | None) -> None:
    """Refuse weights to start from that are not there or do not fit, before any tile is cut.

    Parameters
    ----------
    model : ModelConfig
        The network; its number of classes does not count.
    config : TrainConfig
        `encoder_weights` counts, without `init_from`.
    init_from : Path or None
        A model file.

    Raises
    ------
    TrainingError, ModelError, CheckpointError
        See `initial_network`.
    """
    if init_from is not None:
        _check_same_network(build_model(model, seed=0), load_checkpoint(init_from), init_from)
    elif config.encoder_weights not in ("auto", "none"):
        _load_pretrained(build_model(model, seed=0), config.encoder_weights)


def _load_pretrained(network: SegmentationNetwork, weights: str) -> tuple[str, ...]:
    if weights == "none":
        return ()
    if weights == "auto":
        return _imagenet_if_installed(network)
    if weights != "imagenet":
        return load_encoder_weights(network, Path(weights)).encoders
    roles = load_imagenet_weights(network)
    if not roles:
        raise ModelError(
            f"No ImageNet weights come with the encoders of {network.config.title}; take efficientnet-lite0, or give a "
            f"file with --encoder-weights"
        )
    return roles


def _imagenet_if_installed(network: SegmentationNetwork) -> tuple[str, ...]:
    try:
        return load_imagenet_weights(network)
    except ModelError as error:
        _log.warning("The encoders start from random weights: %s", error)
        return ()


def _copy_weights(network: SegmentationNetwork, classes: ClassMap, path: Path) -> None:
    earlier = load_checkpoint(path)
    _check_same_network(network, earlier, path)
    state, given = network.state_dict(), earlier.state
    taken = {name: tensor for name, tensor in given.items() if not name.startswith("classifier")}
    rows = [earlier.classes.names.index(name) if name in earlier.classes.names else None for name in classes.names]
    for name in set(state) - set(taken):
        taken[name] = _class_rows(state[name], given[name], rows)
    new = [name for name, row in zip(classes.names, rows, strict=True) if row is None]
    if new:
        _log.warning("%s does not know the classes %s: they start from random weights", path, new)
    network.load_state_dict(taken)


def _check_same_network(network: SegmentationNetwork, earlier: Checkpoint, path: Path) -> None:
    state, given = network.state_dict(), earlier.state
    other = {name for name in state if name in given and given[name].shape != state[name].shape}
    if set(state) != set(given) or any(not name.startswith("classifier") for name in other):
        raise TrainingError(
            f"{path} is {earlier.model.title}; it cannot start {network.config.title}. Train with its settings "
            f"(darefine show {path}) or with --from none"
        )


def _class_rows(random: Tensor, given: Tensor, rows: list[int | None]) -> Tensor:
    return torch.stack([random[at] if row is None else given[row] for at, row in enumerate(rows)])


class FrozenLayers:
    """Layers that do not learn: whole encoders at a learning rate of 0, else batch norm layers of encoders.

    Parameters
    ----------
    network : SegmentationNetwork
        Its frozen layers need no gradient from here on.
    config : TrainConfig
        `encoder_lr` and `freeze_batch_norm` count.
    trained : tuple of str
        Roles of the encoders that come trained.

    Attributes
    ----------
    trained : tuple of str
        The same.
    frozen : list of nn.Module
        Encoders, or batch norm layers, that keep their weights and statistics.
    live : list of nn.Module
        The other batch norm layers: the tiles they see at once change what is learned.
    """

    def __init__(self, network: SegmentationNetwork, config: TrainConfig, trained: tuple[str, ...]) -> None:
        self.trained = trained
        roles = {"yes": tuple(network.encoders), "no": (), "auto": trained}[config.freeze_batch_norm]
        self.frozen: list[nn.Module] = [norm for role in roles for norm in _batch_norms(network.encoders[role])]
        if config.encoder_lr == 0:
            self.frozen = list(network.encoders.values())
            _warn_of_frozen(network, trained)
        for module in self.frozen:
            module.requires_grad_(requires_grad=False)
        held = {id(norm) for module in self.frozen for norm in _batch_norms(module)}
        self.live = [norm for norm in _batch_norms(network) if id(norm) not in held]

    def set_eval(self) -> None:
        """Put the frozen layers into evaluation mode, after the network's ``train()``."""
        for module in self.frozen:
            module.eval()


def _warn_of_frozen(network: SegmentationNetwork, trained: tuple[str, ...]) -> None:
    random = sorted(set(network.encoders) - set(trained))
    if not network.encoders:
        _log.warning("encoder_lr = 0 freezes nothing: %s has no encoder that stands alone", network.config.title)
    elif random:
        _log.warning(
            "encoder_lr = 0 keeps %s at random weights; give --encoder-weights or --from",
            " and ".join(f"the {role} encoder" for role in random),
        )


def _batch_norms(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if isinstance(layer, (nn.BatchNorm2d, nn.SyncBatchNorm))]
