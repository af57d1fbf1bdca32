"""The GPT in 8 bits: half the bytes of bfloat16 to read for every token.

Weights are int8 with a scale per output, rounded to nearest (absmax). On CPUs with 8-bit dot products (VNNI) each row
of activations is rounded to 8 bits too, with a scale of its own, and the sums are whole numbers, so a row's result is
the same to the bit whatever the other rows are. Elsewhere activations stay as they are: only the weights have 8 bits.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from clipgen.gpt import GPT, Linear


def round_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (N, K) as int8 (N, K) in [-127, 127] and the scale of each output (N,) float32."""
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


def has_dot_products() -> bool:
    """Whether this CPU multiplies 8-bit numbers, and this PyTorch has the kernels for it."""
    return torch.cpu._is_vnni_supported() and "fbgemm" in torch.backends.quantized.supported_engines


class Int8Linear(nn.Module):
    """A `Linear` whose weight has 8 bits."""

    ends: Tensor
    codes: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        codes, scale = round_weight(linear.weight)
        weight = linear.weight.detach()
        self.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)  # says device and precision
        self.register_buffer("bias", linear.bias.detach().float())
        self.dots = None
        if weight.device.type == "cpu" and has_dot_products():
            # The kernel takes its activations' scale from their range. Rows are brought to [-1, 1] and get its ends
            # appended, with weights of 0: so the scale is the same whatever the rows are.
            self.register_buffer("ends", torch.tensor([[-1.0, 1.0]]))
            self.dots = _pack(F.pad(codes, (0, 2)), scale)
        else:
            self.register_buffer("codes", codes)
            self.register_buffer("scale", scale.to(weight.dtype))

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """x W' + b, through exact GELU where asked for; (B, in_features) -> (B, out_features)."""
        if self.dots is None:
            y = torch._weight_int8pack_mm(x.contiguous(), self.codes, self.scale) + self.bias.to(x.dtype)
        else:
            rows = x.float()
            reach = torch.linalg.vector_norm(rows, torch.inf, dim=1, keepdim=True).clamp_(min=1e-12)
            unit = torch.cat([rows / reach, self.ends.expand(len(x), -1)], dim=1)
            y = torch.addcmul(self.bias, torch.ops.quantized.linear_dynamic(unit, self.dots), reach).to(x.dtype)
        return F.gelu(y) if gelu else y


def _pack(codes: Tensor, scale: Tensor) -> torch.ScriptObject:
    zeros = torch.zeros(len(scale), dtype=torch.long)
    weight = torch._make_per_channel_quantized_tensor(codes, scale.double(), zeros, 0)
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        return torch.ops.quantized.linear_prepack(weight, None)
    finally:
        torch.backends.quantized.engine = before


def quantise(gpt: GPT) -> GPT:
    """Replace the GPT's large weights by 8-bit ones, in place; it can only decode after that (`GPT.advance`)."""
    for module in [m for m in gpt.modules() if not isinstance(m, Linear)]:
        for name, child in list(module.named_children()):
            if isinstance(child, Linear):
                setattr(module, name, Int8Linear(child))
    return gpt
