"""The GPT's linear layers for decoding: prepacked or quantised weights.

A step with few rows is bound by reading weights, so on CPUs their size and layout decide its speed.

int8: a scale per output, rounded to nearest (absmax). With FBGEMM each row of activations is rounded too, with a scale
of its own: to 8 bits on CPUs with VNNI, to 7 on other x86. Elsewhere activations are not rounded.

float16: CPUs lack float16 arithmetic, but FBGEMM widens the weights to float32 as it reads them. This is the default on
CPUs without bfloat16.

Shapes: N out_features, K in_features, B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from clipgen.models.capabilities import dot_product_bits, fbgemm

REFERENCES = (64, 48, 32, 16, 8)
"""Row counts that others are compared with: the first one that gives equal rows equal results."""
DISTINCT = 5
"""Distinct rows in the comparison; coprime to kernels' heights, so that each row takes every position."""


class Linear(nn.Linear):
    """nn.Linear whose weight oneDNN can keep in its own layout, with GELU in the same pass."""

    packed: Tensor | None = None

    def prepack(self) -> None:
        """Pack the weight in oneDNN's layout once, instead of at every call, and free the original."""
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())
        self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """x W' + b, then exact GELU if asked; (..., K) -> (..., N)."""
        if self.packed is None:
            y = super().forward(x)
            return F.gelu(y) if gelu else y
        return torch.ops.mkldnn._linear_pointwise.default(
            x, self.packed, self.bias, "gelu" if gelu else "none", [], "none"
        )


def round_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (N, K) as int8 (N, K) in [-127, 127] and the scale of each output (N,) float32."""
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


# float32 rows, the step and zero of their 8 bits, packed weights -> float32 rows
_multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default


class Int8Linear(nn.Module):
    """A `Linear` of a CPU with int8 weights."""

    codes: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        codes, scale = round_weight(linear.weight)
        # Empty, but with the device and precision.
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        self.register_buffer("bias", linear.bias.detach().float())
        self.packed = None
        bits = dot_product_bits()
        if bits is not None:
            self.packed, self.most = _prepack_int8(codes, scale), 2 ** (bits - 1) - 1
        else:
            self.register_buffer("codes", codes)
            self.register_buffer("scale", scale)

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """x W' + b, then exact GELU if asked; (B, K) -> (B, N)."""
        if self.packed is None:
            y = torch._weight_int8pack_mm(x.contiguous(), self.codes, self.scale) + self.bias
        else:
            # Scale rows to [-1, 1], so that one scale fits all.
            reach = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True).clamp_(min=1e-12)
            y = torch.addcmul(self.bias, _multiply(x / reach, 1 / self.most, self.most + 1, self.packed), reach)
        return F.gelu(y) if gelu else y


class HalfLinear(nn.Module):
    """A `Linear` of a CPU with float16 weights and float32 sums."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        with fbgemm():
            self.packed = torch.ops.quantized.linear_prepack_fp16(
                linear.weight.detach().float(), linear.bias.detach().float()
            )

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """x W' + b, then exact GELU if asked; (B, K) -> (B, N)."""
        y = torch.ops.quantized.linear_dynamic_fp16.default(x, self.packed)
        return F.gelu(y) if gelu else y


def _prepack_int8(codes: Tensor, scale: Tensor) -> torch.ScriptObject:
    zeros = torch.zeros(len(scale), dtype=torch.long)
    weight = torch._make_per_channel_quantized_tensor(codes, scale.double(), zeros, 0)
    with fbgemm():
        return torch.ops.quantized.linear_prepack(weight, None)


def quantise_linears(model: nn.Module, weights: Literal["int8", "float16"]) -> None:
    """Replace every `Linear` of a model on a CPU in place and bring its other parameters to float32."""
    kind: type[Int8Linear | HalfLinear] = Int8Linear if weights == "int8" else HalfLinear
    for module in [m for m in model.modules() if not isinstance(m, Linear)]:
        for name, child in list(module.named_children()):
            if isinstance(child, Linear):
                setattr(module, name, kind(child))
        if not isinstance(module, kind):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()


class RowCounts:
    """Row counts to pad a step to, so that each row's result is bit-identical whatever the other rows.

    Kernels for different numbers of rows sum in different orders: on an AVX2 CPU, FBGEMM rounds a single row
    differently from the same row among three. So counts are found by trying, with the model's own weights, when they
    are needed: the smallest count that gives the same rows as one of `REFERENCES`. Steps are padded to it.

    Args:
        layers: the layers that share a batch, on a CPU; their weights must not change any more.
        least: the smallest count to use.
    """

    def __init__(self, layers: Sequence[nn.Module], least: int = 1) -> None:
        self.layers, self.least = layers, least
        self._counts: dict[tuple[int, int], int | None] = {}
        self._references: dict[int, tuple[int, list[Tensor]] | None] = {}

    def pad(self, x: Tensor) -> Tensor:
        """Append rows of zeros to (B, K), if that makes rows exact."""
        rows = self.at_least(len(x)) or len(x)
        return x if len(x) == rows else F.pad(x, (0, 0, 0, rows - len(x)))

    @torch.inference_mode()
    def at_least(self, rows: int) -> int | None:
        """The count to pad `rows` rows to; None if rows depend on each other at every count tried."""
        key = (rows, torch.get_num_threads())
        if key not in self._counts:
            self._counts[key] = self._find(rows)
        return self._counts[key]

    def _find(self, rows: int) -> int | None:
        threads = torch.get_num_threads()
        if threads not in self._references:
            candidates = ((count, self._outputs(count)) for count in REFERENCES)
            self._references[threads] = next(((n, found) for n, found in candidates if found is not None), None)
        reference = self._references[threads]
        if reference is None:
            return None
        size, expected = reference
        first = max(rows, self.least)
        for count in range(first, first + size):
            found = expected if count == size else self._outputs(count)
            if found is not None and all(map(_agree, found, expected)):
                return count
        return None

    def _outputs(self, rows: int) -> list[Tensor] | None:
        """Each layer's outputs for up to DISTINCT rows, repeated to `rows`; None if repeated rows differ."""
        outputs = []
        for layer in self.layers:
            width, dtype = cast(int, layer.in_features), cast(Tensor, layer.weight).dtype
            distinct = torch.randn(DISTINCT, width, generator=torch.Generator().manual_seed(width))
            which = torch.arange(rows) % DISTINCT
            y = layer(distinct.to(dtype)[which])
            if not torch.equal(y, y[which]):
                return None
            outputs.append(y[:DISTINCT])
        return outputs


def _agree(a: Tensor, b: Tensor) -> bool:
    rows = min(len(a), len(b))
    return torch.equal(a[:rows], b[:rows])
