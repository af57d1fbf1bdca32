"""What is trained and how: initial weights, optimizers, learning rate, weight averages, recomputed activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from clipgen.errors import WeightsError
from clipgen.models.gpt import GPT
from clipgen.weights.model_dir import check_shapes
from clipgen.weights.tensor_file import load_tensors
from train.config import Stage2Config, TrainConfig
from train.loop.muon import Muon


def load_model_weights(model: nn.Module, path: str | Path, prefix: str = "") -> None:
    """Load a .safetensors file into a model, or those of its tensors that are under `prefix`.

    Raises:
        WeightsError: the file is missing, is not .safetensors, or does not fit the model.
    """
    weights = {
        name.removeprefix(prefix): tensor for name, tensor in load_tensors(path).items() if name.startswith(prefix)
    }
    fill(model, weights, path)


def fill(model: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Load weights, which come from `path`, into a model.

    Raises:
        WeightsError: they do not fit.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    try:
        check_shapes(expected, weights, type(model).__name__)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    model.load_state_dict(weights)


def init_weights(model: nn.Module, config: TrainConfig) -> None:
    """Start from the weights in `config.init`, if set, instead of random ones; raises as `load_model_weights` does.

    If the weights are a GPT's with fewer blocks, these are repeated, so that a shallow GPT can be trained first, whose
    steps cost less (Du et al. 2024, "Stacking Your Transformers", arXiv 2405.15319).
    """
    if config.init:
        weights = load_tensors(config.init)
        fill(model, stack_blocks(weights, model.config.n_layer) if isinstance(model, GPT) else weights, config.init)


def stack_blocks(weights: Mapping[str, Tensor], n_layer: int) -> dict[str, Tensor]:
    """A GPT's weights with its blocks repeated, in order, up to `n_layer`; unchanged if `n_layer` is no multiple."""
    stacked = dict(weights)
    blocks = [name.split(".", 2) for name in weights if name.startswith("blocks.")]
    count = len({block for _, block, _ in blocks})
    if count and n_layer % count == 0:
        for _, block, rest in blocks:
            for layer in range(int(block), n_layer, count):
                stacked[f"blocks.{layer}.{rest}"] = weights[f"blocks.{block}.{rest}"]
    return stacked


def enable_recompute(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Keep only the inputs of modules of these types and recompute their activations in the backward pass.

    Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.
    """
    for module in model.modules():
        if isinstance(module, kinds):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next step. It depends on step and configuration only, so nothing of it is saved."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def cosine_schedule(config: TrainConfig) -> Callable[[int], float]:
    """Learning-rate factor by step: linear warm-up, then a cosine down to 2 %."""

    def factor(step: int) -> float:
        if step < config.warmup:
            return (step + 1) / config.warmup
        progress = (step - config.warmup) / max(1, config.steps - config.warmup)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor


def build_optimizers(model: nn.Module, config: Stage2Config, precision: str) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the matrices of the blocks and AdamW for the rest; one learning rate serves both.

    Args:
        precision: of the training here: "bf16", "fp16" or "no".
    """
    # The scaler of fp16 always calls the step of a fused optimizer, which then skips overflows itself, so that
    # Accelerate could not tell that a step was skipped.
    fused = precision != "fp16"
    groups = weight_decay_groups(model, config.weight_decay)
    if config.optimizer == "adamw":
        return [torch.optim.AdamW(groups, config.lr, betas=(0.9, 0.95), fused=fused)]
    matrices = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    by_muon = set(map(id, matrices))
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in by_muon]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    muon = Muon(matrices, config.lr, config.weight_decay, dtype)
    return [muon, torch.optim.AdamW(groups, config.lr, betas=(0.9, 0.95), fused=fused)]


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay; embeddings, positions, gains and biases do not."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (others if parameter.ndim < 2 or "emb" in name else matrices).append(parameter)
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


class MovingAverage(AveragedModel):
    """Exponential moving average of a model's weights; the first update copies them.

    `AveragedModel` copies its step counter to the device in every update, which waits for the device.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self.decay = decay
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards the weights of the model; buffers are copied."""
        averages: list[Tensor] = list(self.module.parameters())
        weights: list[Tensor] = list(model.parameters())
        if self.n_averaged == 0:
            for average, weight in zip(averages, weights, strict=True):
                average.copy_(weight)
        else:
            torch._foreach_lerp_(averages, weights, 1 - self.decay)
        for copy, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            copy.copy_(buffer)
        self.n_averaged += 1


class LowestLoss(nn.Module):
    """The lowest validation loss so far. A module, so that it is saved in checkpoints."""

    loss: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("loss", torch.tensor(float("inf"), dtype=torch.float64))

    def improved(self, loss: float) -> bool:
        """Record a loss and return whether it is the lowest so far."""
        lower = loss < self.loss.item()
        if lower:
            self.loss.fill_(loss)
        return lower
