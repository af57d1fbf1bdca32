"""Matrix products that this CPU supports, found by trying each operation once.

Names of CPUs and instruction sets say little: PyTorch, oneDNN and FBGEMM each choose kernels in their own way, and
ATEN_CPU_CAPABILITY or ONEDNN_MAX_CPU_ISA can restrict them. Nothing here is timed, because the results decide how
numbers are rounded: two runs on one machine must get the same results.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F

HEAD_ROWS = (1, 2, 8, 33)
"""Batch sizes that attention is tried with."""


@contextmanager
def fbgemm() -> Iterator[None]:
    """Prepack for FBGEMM in this block; the quantised engine chosen by others is restored."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def can_prepack(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies with prepacked weights of this type."""
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled) and _prepacks(dtype)


@cache
def _prepacks(dtype: torch.dtype) -> bool:
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    x, weight = torch.full((5, 32), 0.5, dtype=dtype), torch.eye(32, dtype=dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        y = torch.ops.mkldnn._linear_pointwise.default(x, packed, None, "none", [], "none")
    except (RuntimeError, AttributeError):  # bfloat16 needs AVX512 or AVX-NE-CONVERT; other CPUs lack the operator
        return False
    return torch.equal(y, x)


def has_bfloat16() -> bool:
    """Whether bfloat16 is fast: the hardware has bfloat16 products, and oneDNN uses them."""
    found = torch.cpu.get_capabilities()
    return can_prepack(torch.bfloat16) and any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def has_amx() -> bool:
    """Whether bfloat16 products run on Intel's AMX tiles."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16")) and has_bfloat16()


@cache
def has_half_products() -> bool:
    """Whether FBGEMM multiplies float32 rows with float16 weights, which it does on x86."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return False
    x = torch.arange(64.0).view(2, 32)
    try:
        with fbgemm():
            packed = torch.ops.quantized.linear_prepack_fp16(torch.eye(32), torch.zeros(32))
        return torch.equal(torch.ops.quantized.linear_dynamic_fp16.default(x, packed), x)
    except RuntimeError:
        return False


@cache
def dot_product_bits() -> int | None:
    """Bits that activations may have in FBGEMM's products with int8 weights; None without such products.

    8 with VNNI. Without, pairs of products are added in 16 bits, which overflow unless activations have 7.
    """
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return None
    weight = torch._make_per_channel_quantized_tensor(
        torch.full((8, 64), 127, dtype=torch.int8), torch.ones(8, dtype=torch.double), torch.zeros(8).long(), 0
    )
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
    try:
        with fbgemm():
            packed = torch.ops.quantized.linear_prepack(weight, None)
        for bits in (8, 7):
            most = 2 ** (bits - 1) - 1
            # All products at their largest, to detect overflow.
            found, expected = multiply(torch.ones(2, 64), 1 / most, most + 1, packed), torch.full((2, 8), 127.0 * 64)
            if torch.allclose(found, expected):
                return bits
    except RuntimeError:
        return None
    return None


def can_fuse_attention(dtype: torch.dtype, head: int) -> bool:
    """Whether decoding uses PyTorch's fused attention kernel rather than plain products.

    On CPUs with AMX the kernel reads keys and values in bfloat16 2.5 times as fast; elsewhere it is no faster, and in
    bfloat16 five times slower. It must also give a row the same bits whatever the batch.
    """
    return dtype == torch.bfloat16 and has_amx() and _fused_rows_agree(dtype, head, torch.get_num_threads())


@cache
def _fused_rows_agree(dtype: torch.dtype, head: int, threads: int) -> bool:
    most, length = max(HEAD_ROWS), 256
    generator = torch.Generator().manual_seed(threads)
    q, k, v = (torch.randn(most, 4, n, head, generator=generator).to(dtype) for n in (1, length, length))
    mask = torch.zeros(most, 1, 1, length, dtype=dtype)
    mask[..., length // 3 :] = -torch.inf

    def attend(rows: int, seen: int) -> torch.Tensor:
        parts = (q[:rows], k[:rows, :, :seen], v[:rows, :, :seen])
        return F.scaled_dot_product_attention(*parts, attn_mask=mask[:rows, ..., :seen])

    together = attend(most, length)
    return all(torch.equal(attend(n, seen), together[:n]) for n in HEAD_ROWS for seen in (length // 2, length))


def cpu_dtypes() -> list[str]:
    """Names of the precisions that are reasonably fast on this CPU, the default first."""
    found = ["float32", "int8"]
    if has_half_products():
        found.insert(0, "float16")
    if can_prepack(torch.bfloat16):  # without oneDNN a bfloat16 convolution takes 200 times as long as a float32 one
        found.insert(0 if has_bfloat16() else len(found), "bfloat16")
    return found


def instruction_set() -> str:
    """Name of the instructions that products use here: "AVX2", "AVX512-BF16", "AVX512 with AMX"."""
    level = torch.backends.cpu.get_cpu_capability()
    if has_amx():
        return f"{level} with AMX"
    return f"{level}-BF16" if has_bfloat16() else level
