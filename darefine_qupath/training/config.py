"""Define every training setting, its bounds and its default in each preset.

`TrainConfig` as constructed is the paper's recipe (arXiv 1907.06358 and its authors' published settings: three stages
of 25 epochs). `TrainConfig.from_mapping` reads the ``[train]`` table of ``darefine.toml``, a preset name included, and
refuses a key it does not know.
"""

from __future__ import annotations

import difflib
import operator
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any, Literal, NamedTuple

from darefine_qupath.errors import ConfigError
from darefine_qupath.limits import require_finite

__all__ = ["PRESETS", "TrainConfig", "with_current_names"]

# Names and values of settings in the runs of darefine 0.1.
_FORMER_NAMES = {
    "accumulate": "grad_accum_steps",
    "clip_norm": "grad_clip_norm",
    "colour_jitter": "color_jitter",
    "early_stop": "early_stop_patience",
    "optimiser": "optimizer",
    "stage_factors": "lr_factors",
    "symmetries": "flips",
}
_FORMER_VALUES = {("schedule", "stages"): "step", ("schedule", "one-cycle"): "cosine", ("loss", "nll"): "ce"}


class Bounds(NamedTuple):
    """Bounds of a number; None where it has none."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def violation(self, value: float) -> str | None:
        """Say which bound a value breaks."""
        words = ("at least", "more than", "at most", "below")
        holds = (operator.ge, operator.gt, operator.le, operator.lt)
        broken = [
            f"{word} {bound}"
            for word, bound, compare in zip(words, self, holds, strict=True)
            if bound is not None and not compare(value, bound)
        ]
        return broken[0] if broken else None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one training run; the defaults are the preset ``paper``."""

    preset: str = "paper"
    """Where the defaults came from: ``paper`` or ``modern``. Informative: the other fields are what counts."""
    epochs: Annotated[int, Bounds(ge=1)] = 75
    """Passes over the training tiles. The learning-rate stages scale with it."""
    batch_size: Annotated[int, Bounds(ge=1)] = 12
    """Tiles per optimiser step, over all processes and all accumulated parts together."""
    grad_accum_steps: Annotated[int, Bounds(ge=1)] = 1
    """Parts a batch is cut into to save memory. Loss and gradients are those of the whole batch, however many parts
    there are, where batch norm is frozen; where it learns, it sees one part at a time, and the run says so."""
    samples_per_epoch: Annotated[int, Bounds(ge=0)] = 0
    """Tiles drawn per epoch; 0: as many as the training set holds."""
    balance: Annotated[float, Bounds(ge=0, le=1)] = 0.5
    """1: tiles are drawn such that all classes show the same number of pixels. 0: all tiles alike. In full balance a
    tile that holds the commonest class alone may never come: tiles of other classes show enough of it. What looks like
    a lesson only there, normal glands far from any tumour, is then never learned."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    encoder_lr: Annotated[float, Bounds(ge=0)] = 5e-4
    """Highest learning rate of the encoders; 0 freezes them, batch norm included, whatever `freeze_batch_norm` says."""
    decoder_lr: Annotated[float, Bounds(gt=0)] = 5e-3
    """Highest learning rate of everything else."""
    momentum: Annotated[float, Bounds(ge=0, lt=1)] = 0.9
    """Momentum of SGD, first beta of AdamW."""
    weight_decay: Annotated[float, Bounds(ge=0)] = 1e-5
    """Of convolution kernels; AdamW never decays biases and normalisation weights."""
    schedule: Literal["step", "cosine", "constant"] = "step"
    """``step``: equal parts with falling rates. ``cosine``: linear warm-up, then cosine to nearly zero."""
    lr_factors: tuple[float, ...] = (1.0, 0.5, 0.2)
    """Factor on both learning rates in each stage of ``step``."""
    warmup: Annotated[float, Bounds(ge=0, lt=1)] = 0.15
    """Part of all steps that ``cosine`` warms up in."""
    grad_clip_norm: Annotated[float, Bounds(ge=0)] = 10.0
    """Largest norm of all gradients together; 0: not clipped. The paper names none; with its rates a ResNet's gradients
    seldom reach 10, while those of EfficientNet-lite0, whose features are larger, would run away."""
    ema_decay: Annotated[float, Bounds(ge=0, lt=1)] = 0.0
    """Decay per step of an average of the weights, which is then what is validated and kept; 0: no average."""
    freeze_batch_norm: Literal["auto", "yes", "no"] = "auto"
    """Whether the encoders' batch norm keeps its statistics and weights. ``auto``: when they are pretrained."""
    encoder_weights: str = "auto"
    """``auto``: those that an installed package ships, else random. ``imagenet``: the same, but they must be there.
    ``none``: random. Anything else: a file with torchvision's or timm's names."""

    loss: Literal["ce", "ce-dice"] = "ce"
    """``ce``: cross-entropy per pixel, the paper's NLL (Eq. 12). ``ce-dice``: the same plus `dice_weight` times
    (1 - soft Dice) per tile."""
    dice_weight: Annotated[float, Bounds(ge=0)] = 1.0
    """Weight of the Dice term in ``ce-dice``."""
    class_weights: Literal["none", "inverse"] = "none"
    """``inverse``: a class weighs with one over its share of the labelled pixels that the drawn tiles show, mean 1, at
    most 10. With `balance` = 1 the shares are alike already, and so are the weights."""
    allow_missing_classes: bool = False
    """Train although a class has no pixel in the training set."""

    flips: Literal["none", "flip", "dihedral"] = "flip"
    """``flip``: left-right and up-down. ``dihedral``: all eight symmetries of the square."""
    scale: tuple[float, ...] = (0.75, 1.3333)
    """Smallest and largest random magnification; a crop at a random place follows. (1, 1): neither."""
    stain_jitter: Annotated[float, Bounds(ge=0, lt=1)] = 0.0
    """Largest relative change of each stain (haematoxylin, eosin, rest) in HED space."""
    color_jitter: Annotated[float, Bounds(ge=0, lt=1)] = 0.0
    """Largest relative change of brightness, contrast and saturation."""
    context_dropout: Annotated[float, Bounds(ge=0, le=1)] = 0.0
    """Probability that a tile is shown with a blank (white) context."""

    early_stop_patience: Annotated[int, Bounds(ge=0)] = 0
    """Stop after so many validations without a better mIoU; 0: never."""
    validate_every: Annotated[int, Bounds(ge=1)] = 1
    """Epochs between validations; the last epoch is always validated."""
    seed: Annotated[int, Bounds(ge=0, lt=2**31)] = 0
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
    workers: Annotated[int, Bounds(ge=-1)] = -1
    """Processes that read tiles; 0: none; -1: as many as there are cores to spare, none for a set in memory."""
    checkpoint_minutes: Annotated[float, Bounds(ge=0)] = 2.0
    """Minutes between saved states, inside epochs too: the most that a kill costs; 0: at the end of every epoch."""
    checkpoint_steps: Annotated[int, Bounds(ge=0)] = 0
    """Steps between saved states, in addition; 0: by the clock alone."""

    def __post_init__(self) -> None:
        _check_fields(self)
        object.__setattr__(self, "lr_factors", tuple(float(value) for value in self.lr_factors))
        object.__setattr__(self, "scale", tuple(float(value) for value in self.scale))
        _check_together(self)
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
        return replace(PRESETS[name], **{key: _as_tuple(value) for key, value in changes.items()})

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

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; `from_json` gives the same settings back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainConfig:
        """Read what `to_json` gave, in this version or in darefine 0.1."""
        return cls.from_mapping(with_current_names(data))


def with_current_names(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return recorded settings with the names and values they have now."""
    named = {_FORMER_NAMES.get(key, key): value for key, value in table.items()}
    changed = {key: value for (key, former), value in _FORMER_VALUES.items() if named.get(key) == former}
    return {**named, **changed}


def _did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    near = [_FORMER_NAMES[word]] if word in _FORMER_NAMES else difflib.get_close_matches(word, list(known), 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _as_tuple(value: Any) -> Any:  # noqa: ANN401 - any field
    return tuple(value) if isinstance(value, list) else value


def _check_fields(config: TrainConfig) -> None:
    for name, hint in typing.get_type_hints(TrainConfig, include_extras=True).items():
        value = getattr(config, name)
        kind, *bounds = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        if not _fits(value, kind):
            raise ConfigError(f"Training setting {name} = {value!r} must be {_describe(kind)}")
        broken = bounds[0].violation(value) if bounds else None
        if broken:
            raise ConfigError(f"Training setting {name} = {value} must be {broken}")


def _fits(value: object, hint: Any) -> bool:  # noqa: ANN401 - a type form
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, float) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is hint


def _describe(hint: Any) -> str:  # noqa: ANN401 - a type form
    origin = typing.get_origin(hint)
    if origin is Literal:
        return f"one of {list(typing.get_args(hint))}"
    if origin is tuple:
        return "a list of numbers"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]


def _check_together(config: TrainConfig) -> None:
    if min(config.lr_factors, default=-1.0) < 0:
        raise ConfigError(f"Training setting lr_factors = {list(config.lr_factors)} needs numbers of at least 0")
    if len(config.scale) != 2 or not 0.1 <= config.scale[0] <= config.scale[1] <= 10:
        raise ConfigError(f"Training setting scale = {list(config.scale)} must be two rising numbers in 0.1 to 10")
    if config.grad_accum_steps > config.batch_size:
        raise ConfigError(
            f"Training setting grad_accum_steps = {config.grad_accum_steps} cuts a batch of {config.batch_size} into "
            f"empty parts; use at most {config.batch_size}"
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
            schedule="cosine",
            grad_clip_norm=1.0,
            loss="ce-dice",
            flips="dihedral",
            scale=(0.9, 1.1),
            stain_jitter=0.05,
            color_jitter=0.1,
            context_dropout=0.1,
        ),
    }
)
"""The two recipes by name."""
