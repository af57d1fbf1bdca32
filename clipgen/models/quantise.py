"""The GPT's large weights in fewer bytes, of which a step of few rows reads nothing but: int8, and float16 on CPUs.

int8: a scale per output, rounded to nearest (absmax). On CPUs with 8-bit dot products (VNNI) each row of activations is
rounded to 8 bits too, with a scale of its own, and the sums are whole numbers. Elsewhere activations stay as they are.

float16: CPUs have no such arithmetic, but FBGEMM's products widen the weights to float32 as they read them, at the
speed of the memory for one or two rows. It also serves CPUs that have no bfloat16 either.

Both ways a row's result is the same to the bit whatever the other rows are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from clipgen.models.gpt import GPT, Linear


def round_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (N, K) as int8 (N, K) in [-127, 127] and the scale of each output (N,) float32."""
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


def has_dot_products() -> bool:
    """Whether this CPU multiplies 8-bit numbers, and this PyTorch has the kernels for it."""
    return torch.cpu._is_vnni_supported() and "fbgemm" in torch.backends.quantized.supported_engines


def has_half_products() -> bool:
    """Whether this PyTorch has FBGEMM, which multiplies with float16 weights on x86 CPUs."""
    return "fbgemm" in torch.backends.quantized.supported_engines


# float32 rows, the step and zero of their 8 bits, packed weights -> float32 rows
_multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default


class Int8Linear(nn.Module):
    """A `Linear` whose weight has 8 bits."""

    codes: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, linear: Linear, compute: torch.dtype) -> None:
        super().__init__()
        codes, scale = round_weight(linear.weight)
        weight = linear.weight.detach()
        # Nothing in it: it says device and precision.
        self.weight = nn.Parameter(weight.new_empty(0, dtype=compute), requires_grad=False)
        self.register_buffer("bias", linear.bias.detach().float())
        self.dots = None
        if weight.device.type == "cpu" and has_dot_products():
            self.dots = _pack(codes, scale)
        else:
            self.register_buffer("codes", codes)
            self.register_buffer("scale", scale.to(compute))

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """x W' + b, through exact GELU where asked for; (B, in_features) -> (B, out_features)."""
        if self.dots is None:
            y = torch._weight_int8pack_mm(x.contiguous(), self.codes, self.scale) + self.bias.to(x.dtype)
        else:
            # Rows are brought to [-1, 1], so that one scale serves them all.
            reach = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True).clamp_(min=1e-12)
            y = torch.addcmul(self.bias, _multiply(x / reach, 1 / 127, 128, self.dots), reach)
        return F.gelu(y) if gelu else y


class HalfLinear(nn.Module):
    """A `Linear` of a CPU whose weight is float16, its sums float32."""

    def __init__(self, linear: Linear, compute: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.new_empty(0, dtype=compute), requires_grad=False)
        with _fbgemm():
            self.packed = torch.ops.quantized.linear_prepack_fp16(
                linear.weight.detach().float(), linear.bias.detach().float()
            )

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """x W' + b, through exact GELU where asked for; (B, in_features) -> (B, out_features)."""
        y = torch.ops.quantized.linear_dynamic_fp16.default(x, self.packed)
        return F.gelu(y) if gelu else y


def _pack(codes: Tensor, scale: Tensor) -> torch.ScriptObject:
    zeros = torch.zeros(len(scale), dtype=torch.long)
    weight = torch._make_per_channel_quantized_tensor(codes, scale.double(), zeros, 0)
    with _fbgemm():
        return torch.ops.quantized.linear_prepack(weight, None)


@contextmanager
def _fbgemm() -> Iterator[None]:
    """Pack for FBGEMM; the engine chosen for others stays."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def quantise(gpt: GPT, weights: Literal["int8", "float16"], cache: torch.dtype) -> GPT:
    """Replace the GPT's large weights, in place; it can only decode after that (`GPT.decode_step`).

    Args:
        gpt: in any precision; its weights are rounded from that.
        weights: "int8", or "float16", which needs a CPU with FBGEMM (`has_half_products`).
        cache: the precision of keys and values, and on a GPU of everything else that is not quantised. On a CPU that
            is float32, in which the products give their sums.
    """
    compute = torch.float32 if gpt.head.weight.device.type == "cpu" else cache
    gpt.quantised, gpt.cache_as = weights, cache
    kind: type[Int8Linear | HalfLinear] = Int8Linear if weights == "int8" else HalfLinear
    for module in [m for m in gpt.modules() if not isinstance(m, Linear)]:
        for name, child in list(module.named_children()):
            if isinstance(child, Linear):
                setattr(module, name, kind(child, compute))
        if not isinstance(module, kind):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(compute)
    return gpt
