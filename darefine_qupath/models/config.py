"""Describe what a network is made of (`ModelConfig`) and how pixels become its input (`Normalization`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from darefine_qupath.devices import to_device
from darefine_qupath.errors import ModelError
from darefine_qupath.limits import require_finite
from darefine_qupath.models.registry import ENCODERS, FUSIONS, NETWORKS

__all__ = ["InputMode", "ModelConfig", "Normalization"]

InputMode = Literal["dual", "single", "multisize"]

_WIDEST = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Everything that decides which parameters a network has.

    Attributes
    ----------
    network : str
        A registered network: ``"da-refinenet"``, or ``"refinenet"`` and ``"unet"``, the single-input baselines it was
        compared with.
    slice_encoder, context_encoder : str
        Registered encoders. U-Net has its own encoder and uses neither; a network without a context uses the first.
    fusion : str
        A registered fusion of slice and context, for DA-RefineNet: ``"attention"``, ``"add"`` and ``"concat"`` are the
        paper's; ``"aligned"`` also looks at the part of the context where the slice lies.
    input : {"dual", "single", "multisize"}
        ``dual`` is the paper's network. ``single`` has no context; ``multisize`` sees the slice itself, at half the
        resolution, in the place of the context. Only DA-RefineNet has the choice.
    num_classes : int
        Classes; the channels of the logits.
    width : int
        Decoder channels at 1/16, 1/8 and 1/4 of the input; twice as many at 1/32. 256 in the paper.
    dropout : float
        Probability, on the two deepest features of each encoder and before the classifier.
    """

    network: str = "da-refinenet"
    slice_encoder: str = "resnet50"
    context_encoder: str = "resnet50"
    fusion: str = "attention"
    input: InputMode = "dual"
    num_classes: int = 4
    width: int = 256
    dropout: float = 0.5

    def __post_init__(self) -> None:
        _check_choice("network", self.network, NETWORKS)
        _check_choice("fusion", self.fusion, FUSIONS)
        _check_choice("input", self.input, get_args(InputMode))
        _check_choice("slice_encoder", self.slice_encoder, ENCODERS)
        _check_choice("context_encoder", self.context_encoder, ENCODERS)
        if not _is_int(self.num_classes) or not 1 <= self.num_classes <= 255:
            raise ModelError(f"num_classes = {self.num_classes!r} must be a whole number from 1 to 255")
        if not _is_int(self.width) or not 4 <= self.width <= _WIDEST or self.width % 4:
            raise ModelError(
                f"width = {self.width!r} must be a positive multiple of 4 and at most {_WIDEST} (256 in the paper)"
            )
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ModelError(f"dropout = {self.dropout!r} must be at least 0 and below 1")

    @property
    def uses_context(self) -> bool:
        """Whether the network looks at the context it is given."""
        return NETWORKS[self.network].fuses_context and self.input == "dual"

    @property
    def uses_box(self) -> bool:
        """Whether the network must be told where in the context the slice lies."""
        return self.uses_context and FUSIONS[self.fusion].uses_box

    @property
    def encoders(self) -> dict[str, str]:
        """Names of the encoders that the network has, by role: ``"slice"``, ``"context"``."""
        names = {"slice": self.slice_encoder, "context": self.context_encoder}
        roles = [role for role in NETWORKS[self.network].encoders if role == "slice" or self.input != "single"]
        return {role: names[role] for role in roles}

    @property
    def title(self) -> str:
        """One line for people, for example ``DA-RefineNet (attention), resnet50 + resnet50, width 256``."""
        name = NETWORKS[self.network].title
        if NETWORKS[self.network].fuses_context:
            kind = {"dual": "", "single": ", single input", "multisize": ", multi-size"}[self.input]
            name = f"{name} ({self.fusion}{kind})"
        return ", ".join(filter(None, [name, " + ".join(self.encoders.values()), f"width {self.width}"]))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; `from_json` gives the same configuration back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Rebuild the configuration that `to_json` wrote.

        Raises
        ------
        ModelError
            If a key is not known or a value cannot be used.
        """
        known = [item.name for item in fields(cls)]
        unknown = sorted(set(map(str, data)) - set(known))
        if unknown or not isinstance(data, Mapping):
            raise ModelError(f"Unknown network setting {unknown}; known are {known}")
        return cls(**data)


@dataclass(frozen=True, kw_only=True, slots=True)
class Normalization:
    """Mean and standard deviation that are taken from the pixels, per channel, where 1 is white.

    Attributes
    ----------
    mean, std : tuple of float
        For red, green and blue; ImageNet's by default.
    context : Normalization or None
        Of what the context encoder sees; None where it is the same.
    """

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    context: Normalization | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = tuple(float(value) for value in getattr(self, name))
            if len(values) != 3:
                raise ModelError(f"Normalisation {name} = {list(values)} needs three numbers, for red, green and blue")
            object.__setattr__(self, name, values)
        require_finite(self, ModelError, "Normalisation ")
        if min(self.std) <= 0:
            raise ModelError(f"Normalisation std = {list(self.std)} must be positive")
        if self.context is not None and (self.context.mean, self.context.std) == (self.mean, self.std):
            object.__setattr__(self, "context", None)

    @classmethod
    def of(cls, config: ModelConfig) -> Normalization:
        """Return the normalization that the pretrained weights of each encoder want."""
        first, *others = [
            cls(mean=entry.mean, std=entry.std) for entry in map(ENCODERS.__getitem__, config.encoders.values())
        ] or [cls()]
        return replace(first, context=others[0] if others else None)

    @property
    def of_context(self) -> Normalization:
        """Normalization of the context's pixels."""
        return self if self.context is None else self.context

    def apply(self, image: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Turn pixels into the input of a network.

        Parameters
        ----------
        image : Tensor of uint8, shape (B, 3, H, W) or (B, H, W, 3)
            RGB. A batch of shape (B, 3, H, 3) is read as channels first.
        dtype : torch.dtype
            Of the result.

        Returns
        -------
        Tensor, shape (B, 3, H, W)
            Channels-last in memory when the input was.

        Raises
        ------
        ModelError
            If the shape is neither.
        """
        if image.ndim != 4 or 3 not in (image.shape[1], image.shape[3]):
            raise ModelError(f"Expected RGB pixels of shape (B, 3, H, W) or (B, H, W, 3), got {tuple(image.shape)}")
        image_B3HW = image if image.shape[1] == 3 else image.permute(0, 3, 1, 2)
        mean_311, scale_311 = (
            to_device(torch.tensor(values, dtype=torch.float32).mul_(255)[:, None, None], image.device)
            for values in (self.mean, self.std)
        )
        return ((image_B3HW.to(torch.float32) - mean_311) / scale_311).to(dtype)

    def slice_to_context(self, slice_B3HW: Tensor) -> Tensor:
        """Turn normalised pixels of a slice into what the context encoder wants of the same pixels."""
        if self.context is None:
            return slice_B3HW
        mean_311, std_311, other_mean_311, other_std_311 = (
            to_device(torch.tensor(values, dtype=torch.float32)[:, None, None], slice_B3HW.device)
            for values in (self.mean, self.std, self.context.mean, self.context.std)
        )
        return (slice_B3HW * std_311 + (mean_311 - other_mean_311)) / other_std_311

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; `from_json` gives the same back."""
        context = {} if self.context is None else {"context": self.context.to_json()}
        return {"mean": list(self.mean), "std": list(self.std), **context}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Normalization:
        """Rebuild what `to_json` wrote."""
        try:
            context = None if data.get("context") is None else cls.from_json(data["context"])
            return cls(mean=tuple(data["mean"]), std=tuple(data["std"]), context=context)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ModelError(f"Not a normalisation: {data!r} ({error})") from None


def _check_choice(name: str, value: object, choices: Collection[str]) -> None:
    if value not in choices:
        raise ModelError(f"{name} = {value!r} is not one of {list(choices)}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
