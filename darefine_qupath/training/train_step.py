"""Take one optimizer step: the same whether a batch is taken whole, in parts, or by several processes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from darefine_qupath.devices import DTYPES, autocast, choose_precision, full_float32
from darefine_qupath.errors import TrainingError
from darefine_qupath.models import Normalization, SegmentationNetwork
from darefine_qupath.training.augment import AugmentationParams, TileBatch, apply_augmentation
from darefine_qupath.training.config import TrainConfig
from darefine_qupath.training.distributed import ProcessGroup
from darefine_qupath.training.initialize import FrozenLayers
from darefine_qupath.training.losses import SegmentationLoss
from darefine_qupath.training.schedule import build_optimizer, set_learning_rates

__all__ = ["StepOutcome", "Stepper", "compile_advice"]

_SMALLEST_SCALE = 2.0**-10


class StepOutcome(NamedTuple):
    """Results of a step; tensors, so that nobody waits for the device before they are needed.

    Attributes
    ----------
    loss : Tensor
        Of the whole batch, over all processes.
    own_loss : Tensor
        What this process's part adds to it.
    num_stops : Tensor
        Processes that were asked to stop.
    num_saves : Tensor
        Processes that ask for the state to be saved.
    learning_rate : float
        Of the decoder, at this step.
    """

    loss: Tensor
    own_loss: Tensor
    num_stops: Tensor
    num_saves: Tensor
    learning_rate: float


@contextmanager
def compile_advice() -> Iterator[None]:
    """Turn torch's errors about a network that it cannot compile here into a line that says what to do.

    Raises
    ------
    TrainingError
        In the place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(f"torch.compile does not work here ({reason}); train with compile = false") from error


class Stepper:
    """Network, optimiser and everything else that changes with a step.

    Parameters
    ----------
    network : SegmentationNetwork
        On the CPU; moved to the group's device.
    config : TrainConfig
        The recipe.
    group : ProcessGroup
        This process among all.
    normalization : Normalization
        How pixels become input.
    frozen : FrozenLayers
        Layers that keep their statistics.
    class_weights : Tensor, optional
        Shape (K,).
    num_steps : int
        Steps of the whole run, for the schedule.

    Attributes
    ----------
    network : SegmentationNetwork
        The weights that are trained.
    average : SegmentationNetwork or None
        Their running average, where the recipe asks for one.
    step : int
        Steps done.
    """

    def __init__(
        self,
        network: SegmentationNetwork,
        config: TrainConfig,
        *,
        group: ProcessGroup,
        normalization: Normalization,
        frozen: FrozenLayers,
        class_weights: Tensor | None = None,
        num_steps: int = 1,
    ) -> None:
        self.config, self.group, self.normalization, self.frozen = config, group, normalization, frozen
        self.num_steps, self.step = num_steps, 0
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.network: SegmentationNetwork = network.to(group.device, memory_format=self.memory_format)  # type: ignore[call-overload]
        self.network.expect(normalization)
        self.dtype = DTYPES[choose_precision(config.precision, group.device, training=True)]
        self.optimizer = build_optimizer(self.network, config)
        self.scaler = torch.amp.GradScaler(group.device.type, enabled=self.dtype == torch.float16)
        self.loss = SegmentationLoss(config, class_weights).to(group.device)
        self.average: SegmentationNetwork | None = copy.deepcopy(self.network) if config.ema_decay else None
        self._parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self._forward = group.wrap(cast("nn.Module", torch.compile(self.network)) if config.compile else self.network)

    @property
    def best_network(self) -> SegmentationNetwork:
        """The network that is validated and kept: the average where there is one."""
        return self.network if self.average is None else self.average

    def train_on(
        self,
        batch: TileBatch,
        draws: Sequence[AugmentationParams],
        factor: float,
        *,
        stop: bool = False,
        save: bool = False,
    ) -> StepOutcome:
        """Take one step.

        Parameters
        ----------
        batch : Batch
            This process's tiles, on the CPU.
        draws : sequence of AugmentationParams
            How to change each.
        factor : float
            On the learning rates.
        stop : bool
            Tell the other processes that this one was asked to stop.
        save : bool
            Ask them to save the state with this one.

        Returns
        -------
        StepOutcome
            Not yet waited for.
        """
        self.network.train()
        self.frozen.set_eval()
        self._seed_dropout()
        set_learning_rates(self.optimizer, factor)
        learning_rate = self.config.decoder_lr * factor
        batch = apply_augmentation(batch.to(self.group.device), draws)
        own = self.loss.count_labels(batch.masks)
        shared = self.group.sum(torch.cat([own, own.new_tensor([float(stop), float(save)])]))
        # Backward too, where autocast must not be.
        with compile_advice(), full_float32() if self.dtype == torch.float32 else nullcontext():
            own_loss = self._backward(batch, shared[:2])
        self._update()
        self.step += 1
        return StepOutcome(self.group.sum(own_loss), own_loss, shared[2], shared[3], learning_rate)

    def find_bad_weights(self) -> str | None:
        """Say what is wrong with the weights or gradients; None where nothing is.

        Waits for the device. With fp16 a step whose gradients overflow is left out and the scale of the loss halved,
        which is as it should be, unless no scale is small enough.
        """
        if any(not bool(weight.isfinite().all()) for weight in self.network.parameters()):
            return "The weights are not finite (NaN or infinite)"
        if self.scaler.is_enabled() and self.scaler.get_scale() < _SMALLEST_SCALE:
            return f"Gradients overflow fp16 at every step (the loss is scaled by {self.scaler.get_scale():.2g})"
        return None

    def _seed_dropout(self) -> None:
        """Seed dropout by seed, step and process, so that a resumed run draws what an unbroken one does."""
        entropy = np.random.SeedSequence([self.config.seed, self.step, self.group.rank])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]) >> 1)

    def _backward(self, batch: TileBatch, counts_2: Tensor) -> Tensor:
        """Add up the gradients of the batch's parts; return this process's share of the loss."""
        num_parts = self.config.grad_accum_steps
        edges = [math.floor(len(batch.masks) * part / num_parts) for part in range(num_parts + 1)]
        total = torch.zeros((), device=self.group.device)
        for part in range(num_parts):
            with self._synchronized(last=part == num_parts - 1):
                loss = self.loss_of(batch.part(slice(edges[part], edges[part + 1])), counts_2)
                # Gradients are averaged over the processes; the loss is a sum over them.
                self.scaler.scale(loss * self.group.size).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def _synchronized(self, *, last: bool) -> AbstractContextManager[object]:
        """Exchange gradients with the other processes after the last part alone."""
        if isinstance(self._forward, DistributedDataParallel) and not last:
            return self._forward.no_sync()
        return nullcontext()

    def loss_of(self, batch: TileBatch, counts_2: Tensor) -> Tensor:
        """Compute the loss of tiles that are on the device; see `SegmentationLoss`."""
        slice_B3HW = self.normalization.apply(batch.slices).contiguous(memory_format=self.memory_format)
        context_B3HW = self.normalization.of_context.apply(batch.contexts).contiguous(memory_format=self.memory_format)
        with autocast(self.group.device, self.dtype):
            logits_BKHW = self._forward(slice_B3HW, context_B3HW, batch.boxes)
        loss: Tensor = self.loss(logits_BKHW, batch.masks, counts_2)
        return loss

    def _update(self) -> None:
        if self.config.grad_clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self._parameters, self.config.grad_clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self._update_average(self.average)

    @torch.no_grad()
    def _update_average(self, average: SegmentationNetwork) -> None:
        # A young average would remember random weights for long: its decay starts low.
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        for mean, value in zip(average.parameters(), self.network.parameters(), strict=True):
            mean.lerp_(value, 1 - decay)
        for kept, buffer in zip(average.buffers(), self.network.buffers(), strict=True):
            kept.copy_(buffer)
