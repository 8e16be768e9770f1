"""Logits that every version must reproduce: variants, weights that depend on no random generator, and the samples.

``python -m tests.stored_logits`` writes ``tests/data/logits`` anew. Do that only when a network is meant to change; the
changelog then says that older model files predict differently.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from darefine_qupath.models import ModelConfig, build_model

FOLDER = Path(__file__).parent / "data" / "logits"
SIZE_PX = 64
SMALL = {"slice_encoder": "resnet18", "context_encoder": "resnet18", "width": 16}
VARIANTS: dict[str, ModelConfig] = {
    **{f"dual-{fusion}": ModelConfig(**SMALL, fusion=fusion) for fusion in ("attention", "add", "concat", "aligned")},
    **{f"single-{fusion}": ModelConfig(**SMALL, fusion=fusion, input="single") for fusion in ("attention", "add")},
    "multisize-attention": ModelConfig(**SMALL, input="multisize"),
    "resnet50": ModelConfig(slice_encoder="resnet50", context_encoder="resnet18", width=16),
    "efficientnet-lite0": ModelConfig(
        slice_encoder="efficientnet-lite0", context_encoder="efficientnet-lite0", width=16
    ),
    "refinenet": ModelConfig(**SMALL, network="refinenet"),
    "unet": ModelConfig(network="unet", width=16),
}
BOX_B4 = torch.tensor([[0.25, 0.5, 0.5, 0.75], [0.0, 0.1, 0.9, 1.0]])


def noise(count: int, stream: int) -> NDArray[np.float64]:
    """Numbers in [-1, 1) of a fixed hash (splitmix64) of their position: the same wherever they are computed."""
    state = np.arange(count, dtype=np.uint64) + np.uint64(stream) * np.uint64(1 << 40)
    state = (state + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) / 2**52 - 1


def seeded_state(template: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for a state_dict of these names and shapes; no feature of any variant saturates."""
    state = {}
    for stream, (name, tensor) in enumerate(template.items()):
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros_like(tensor)
            continue
        values = noise(tensor.numel(), stream).reshape(tensor.shape)
        if tensor.ndim == 4:
            values = values / np.prod(tensor.shape[1:]) ** 0.5
        elif name.endswith(("running_var", "weight")):
            values = 1 + 0.2 * values
        else:
            values = 0.1 * values
        state[name] = torch.from_numpy(values.astype(np.float32))
    return state


def image(stream: int, input_px: int = SIZE_PX) -> Tensor:
    """Two images of a fixed noise, shape (2, 3, input_px, input_px)."""
    values = noise(2 * 3 * input_px * input_px, 10_000 + stream).astype(np.float32)
    return torch.from_numpy(values).reshape(2, 3, input_px, input_px) * 1.7


def sampled_logits(config: ModelConfig) -> Tensor:
    """Every eighth row and column of the logits of a variant, shape (2, 4, 8, 8)."""
    network = build_model(config).eval()
    network.load_state_dict(seeded_state(network.state_dict()))
    with torch.inference_mode():
        logits: Tensor = network(image(0), image(1), BOX_B4)
    return logits[:, :, ::8, ::8].contiguous()


def write() -> None:
    """Write one file per variant."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, config in VARIANTS.items():
        save_file({"logits": sampled_logits(config)}, FOLDER / f"{name}.safetensors")


if __name__ == "__main__":
    write()
