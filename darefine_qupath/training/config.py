"""How to train: every setting, its default in each preset, and nothing that runs.

`TrainConfig` as constructed is the paper's recipe (arXiv 1907.06358 and its authors' published settings: three stages
of 25 epochs). `TrainConfig.from_mapping` reads the ``[train]`` table of ``darefine.toml``, a preset name included, and
refuses a key it does not know.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from darefine_qupath.errors import ConfigError
from darefine_qupath.limits import require_finite

__all__ = ["PRESETS", "TrainConfig"]

_SMALL = 1e-12


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one training run; the defaults are the preset ``paper``."""

    preset: str = "paper"
    """Where the defaults came from: ``paper`` or ``modern``. Informative: the other fields are what counts."""
    epochs: int = 75
    """Passes over the training tiles. The learning-rate stages scale with it."""
    batch_size: int = 12
    """Tiles per optimiser step, over all processes and all accumulated parts together."""
    accumulate: int = 1
    """Parts a batch is cut into to save memory. Loss and gradients are those of the whole batch, however many parts
    there are, where batch norm is frozen; where it learns, it sees one part at a time, and the run says so."""
    samples_per_epoch: int = 0
    """Tiles drawn per epoch; 0: as many as the training set holds."""
    balance: float = 0.5
    """1: tiles are drawn such that all classes show the same number of pixels. 0: all tiles alike. In full balance a
    tile that holds the commonest class alone may never come: tiles of other classes show enough of it. What looks like
    a lesson only there, normal glands far from any tumour, is then never learnt."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    encoder_lr: float = 5e-4
    """Highest learning rate of the encoders; 0 freezes them, batch norm included, whatever `freeze_batch_norm` says."""
    decoder_lr: float = 5e-3
    """Highest learning rate of everything else."""
    momentum: float = 0.9
    """Momentum of SGD, first beta of AdamW."""
    weight_decay: float = 1e-5
    """Of convolution kernels; AdamW never decays biases and normalisation weights."""
    schedule: Literal["stages", "one-cycle", "constant"] = "stages"
    """``stages``: equal parts with falling rates. ``one-cycle``: linear warm-up, then cosine to nearly zero."""
    stage_factors: tuple[float, ...] = (1.0, 0.5, 0.2)
    """Factor on both learning rates in each stage of ``stages``."""
    warmup: float = 0.15
    """Part of all steps that ``one-cycle`` warms up in."""
    clip_norm: float = 10.0
    """Largest norm of all gradients together; 0: not clipped. The paper names none; with its rates a ResNet's gradients
    seldom reach 10, while those of EfficientNet-lite0, whose features are larger, would run away."""
    ema_decay: float = 0.0
    """Decay per step of an average of the weights, which is then what is validated and kept; 0: no average."""
    freeze_batch_norm: Literal["auto", "yes", "no"] = "auto"
    """Whether the encoders' batch norm keeps its statistics and weights. ``auto``: when they are pretrained."""
    encoder_weights: str = "auto"
    """``auto``: those that an installed package ships, else random. ``imagenet``: the same, but they must be there.
    ``none``: random. Anything else: a file with torchvision's or timm's names."""

    loss: Literal["nll", "ce-dice"] = "nll"
    """``nll``: cross-entropy per pixel. ``ce-dice``: the same plus `dice_weight` times (1 - soft Dice) per tile."""
    dice_weight: float = 1.0
    """Weight of the Dice term in ``ce-dice``."""
    class_weights: Literal["none", "inverse"] = "none"
    """``inverse``: a class weighs with one over its share of the labelled pixels that the drawn tiles show, mean 1, at
    most 10. With `balance` = 1 the shares are alike already, and so are the weights."""
    allow_missing_classes: bool = False
    """Train although a class has no pixel in the training set."""

    symmetries: Literal["none", "flip", "dihedral"] = "flip"
    """``flip``: left-right and up-down. ``dihedral``: all eight symmetries of the square."""
    scale: tuple[float, ...] = (0.75, 1.3333)
    """Smallest and largest random magnification; a crop at a random place follows. (1, 1): neither."""
    stain_jitter: float = 0.0
    """Largest relative change of each stain (haematoxylin, eosin, rest) in HED space."""
    color_jitter: float = 0.0
    """Largest relative change of brightness, contrast and saturation."""
    context_dropout: float = 0.0
    """Probability that a tile is shown with a blank (white) context."""

    early_stop: int = 0
    """Stop after so many validations without a better mIoU; 0: never."""
    validate_every: int = 1
    """Epochs between validations; the last epoch is always validated."""
    seed: int = 0
    """Of weights, order, augmentation and dropout: the same seed gives the same weights on a CPU."""

    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """``auto``: bf16 on a CUDA device that has it, fp16 on an older one, else fp32. ``fp32`` is float32
    throughout, never TF32."""
    channels_last: bool = True
    """Memory format of weights and images; faster on tensor cores and on most CPUs."""
    compile: bool = False
    """`torch.compile` the network: a minute at the start, then faster steps on a GPU."""
    workers: int = -1
    """Processes that read tiles; 0: none; -1: as many as there are cores to spare, none for a set in memory."""
    checkpoint_minutes: float = 2.0
    """Minutes between saved states, inside epochs too: the most that a kill costs; 0: at the end of every epoch."""
    checkpoint_steps: int = 0
    """Steps between saved states, in addition; 0: by the clock alone."""

    def __post_init__(self) -> None:
        _check_types(self)
        object.__setattr__(self, "stage_factors", tuple(float(value) for value in self.stage_factors))
        object.__setattr__(self, "scale", tuple(float(value) for value in self.scale))
        _check_ranges(self)
        require_finite(self, ConfigError, "Training setting ")

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> TrainConfig:  # noqa: ANN401 - any field
        """Return a preset with some values changed.

        Parameters
        ----------
        name : str
            ``paper`` or ``modern``.
        **changes
            Fields of `TrainConfig`.

        Returns
        -------
        TrainConfig

        Raises
        ------
        ConfigError
            If the preset or a field is not known, or a value is out of range.
        """
        if name not in PRESETS:
            raise ConfigError(f"No training preset {name!r}{_did_you_mean(name, PRESETS)}; known are {sorted(PRESETS)}")
        known = [field.name for field in fields(cls)]
        for key in changes:
            if key not in known:
                raise ConfigError(f"Unknown training setting {key!r}{_did_you_mean(key, known)}")
        return replace(PRESETS[name], **{key: _tupled(value) for key, value in changes.items()})

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> TrainConfig:
        """Read a table as TOML or JSON gives it.

        Parameters
        ----------
        data : mapping
            Fields of `TrainConfig`; ``preset`` chooses the defaults of the rest. Dashes may stand for underscores.

        Returns
        -------
        TrainConfig

        Raises
        ------
        ConfigError
            Names the key that is not known, with the nearest one that is, or the value that cannot be.
        """
        changes = {key.replace("-", "_"): value for key, value in data.items()}
        return cls.from_preset(str(changes.pop("preset", "paper")), **changes)

    def to_mapping(self) -> dict[str, Any]:
        """Return plain JSON values; `from_mapping` gives the same settings back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def _did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _tupled(value: Any) -> Any:  # noqa: ANN401 - any field
    return tuple(value) if isinstance(value, list) else value


def _check_types(config: TrainConfig) -> None:
    for name, hint in typing.get_type_hints(TrainConfig).items():
        value = getattr(config, name)
        if not _fits(value, hint):
            raise ConfigError(f"Training setting {name} = {value!r} must be {_spoken(hint)}")


def _fits(value: object, hint: Any) -> bool:  # noqa: ANN401 - a type form
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, float) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is hint


def _spoken(hint: Any) -> str:  # noqa: ANN401 - a type form
    origin = typing.get_origin(hint)
    if origin is Literal:
        return f"one of {list(typing.get_args(hint))}"
    if origin is tuple:
        return "a list of numbers"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]


_AT_LEAST: Mapping[str, float] = {
    "epochs": 1,
    "batch_size": 1,
    "accumulate": 1,
    "samples_per_epoch": 0,
    "balance": 0,
    "encoder_lr": 0,
    "decoder_lr": _SMALL,
    "momentum": 0,
    "weight_decay": 0,
    "warmup": 0,
    "clip_norm": 0,
    "ema_decay": 0,
    "dice_weight": 0,
    "stain_jitter": 0,
    "color_jitter": 0,
    "context_dropout": 0,
    "early_stop": 0,
    "validate_every": 1,
    "seed": 0,
    "workers": -1,
    "checkpoint_minutes": 0,
    "checkpoint_steps": 0,
}
_BELOW: Mapping[str, float] = {
    "balance": 1 + _SMALL,
    "momentum": 1,
    "warmup": 1,
    "ema_decay": 1,
    "context_dropout": 1 + _SMALL,
    "stain_jitter": 1,
    "color_jitter": 1,
    "seed": 2**31,
}


def _check_ranges(config: TrainConfig) -> None:
    for name, low in _AT_LEAST.items():
        if not getattr(config, name) >= low:
            least = "more than 0" if low == _SMALL else f"at least {low}"
            raise ConfigError(f"Training setting {name} = {getattr(config, name)} must be {least}")
    for name, high in _BELOW.items():
        if not getattr(config, name) < high:
            raise ConfigError(f"Training setting {name} = {getattr(config, name)} must be below {high:g}")
    if min(config.stage_factors, default=-1.0) < 0:
        raise ConfigError(f"Training setting stage_factors = {list(config.stage_factors)} needs numbers of at least 0")
    if len(config.scale) != 2 or not 0.1 <= config.scale[0] <= config.scale[1] <= 10:
        raise ConfigError(f"Training setting scale = {list(config.scale)} must be two rising numbers in 0.1 to 10")
    if config.accumulate > config.batch_size:
        raise ConfigError(
            f"Training setting accumulate = {config.accumulate} cuts a batch of {config.batch_size} into empty parts; "
            f"use at most {config.batch_size}"
        )


PRESETS: Mapping[str, TrainConfig] = types.MappingProxyType(
    {
        "paper": TrainConfig(),
        "modern": TrainConfig(
            preset="modern",
            epochs=30,
            batch_size=8,
            optimizer="adamw",
            encoder_lr=3e-4,
            decoder_lr=1e-3,
            weight_decay=1e-2,
            schedule="one-cycle",
            clip_norm=1.0,
            loss="ce-dice",
            symmetries="dihedral",
            scale=(0.9, 1.1),
            stain_jitter=0.05,
            color_jitter=0.1,
            context_dropout=0.1,
        ),
    }
)
"""The two recipes by name."""
