"""Seconds per image at full size, against alternatives and the floors of the machine."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from roofline import step_bytes, step_flops

from clipgen.engine.engine import Engine
from clipgen.models.gpt import GPT
from clipgen.request import GenerationRequest
from gpucheck.models import PARAMS, preset, random_gpt, random_pipeline, seconds, sequences, wait
from gpucheck.report import Bench, Figure
from train.loop.samples import generate_tokens

T4_BYTES, T4_FLOPS = 320e9 * 0.75, 65e12 * 0.5
"""What a T4 reads and multiplies in float16 a second: NVIDIA's figures, times what kernels usually reach of them."""


def decoding(bench: Bench) -> Iterator[Figure]:
    """Decoding time of one image and of many, with and without graphs, against the uncached loop and transformers."""
    config, dtype = preset(bench), torch.float16 if bench.is_cuda else torch.float32
    gpt = random_gpt(config, bench.device, dtype)
    engine, length = Engine(gpt), config.gpt.block_size
    one = seconds(bench, lambda: engine.generate(sequences(1, config)))
    yield _goal(bench, "1 image, tokens", one, 0.12)
    conditions = torch.stack([seq.condition for seq in sequences(1, config)]).to(bench.device)
    eager = seconds(bench, lambda: generate_tokens(gpt, conditions, [0], PARAMS), 1)
    yield Figure("1 image without graphs", eager, "s")
    many = 8 if bench.tiny else 64
    yield Figure(f"{many} images, tokens", seconds(bench, lambda: engine.generate(sequences(many, config)), 1), "s")
    uncached = _uncached(bench, random_gpt(config, bench.device, torch.float32))
    yield Figure("1 image, uncached float32 loop", uncached, "s")
    yield Figure("uncached loop against ours at 1 image", uncached / one, "x")
    theirs = _transformers(bench, config.gpt, dtype)
    if theirs is None:
        yield Figure("transformers' generate", "not installed")
    else:
        ratio, goal = theirs / one, "" if bench.tiny else "at least 10 x"
        yield Figure("transformers' generate against ours at 1 image", ratio, "x", goal, ratio >= 10 if goal else None)
    read, multiply = _rates(bench, dtype)
    yield Figure("memory reads", read / 1e9, "GB/s")
    yield Figure("matrix products", multiply / 1e12, "TFLOP/s")
    bytes_read, flops = step_bytes(config.gpt, 1, dtype.itemsize, length), step_flops(config.gpt, 1)
    floors = f"{length * bytes_read / read:.4f}, {length * flops / multiply:.4f}"
    yield Figure("floor of 1 image: bytes, products", floors, "s")
    for rows in (1, 64):
        floor = max(step_bytes(config.gpt, rows, 2, length) / T4_BYTES, step_flops(config.gpt, rows) / T4_FLOPS)
        yield Figure(f"T4 by arithmetic, {rows} images", length * floor, "s")


def images(bench: Bench) -> Iterator[Figure]:
    """Time and memory from the prompt to ranked images at full size."""
    dtype = torch.float16 if bench.is_cuda else torch.float32
    for name, goal, memory in (("coco", 1.0, 6.0), ("imagenet", 3.0, 14.0)):
        if bench.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(bench.device)
        pipe, count = random_pipeline(bench, dtype, name), 8 if bench.tiny else 64
        request = GenerationRequest("a lemon", 8, count, seed=0)
        spent = seconds(bench, lambda pipe=pipe, request=request: pipe.generate([request]), 1)
        yield _goal(bench, f"{name}: {count} candidates to ranked images", spent, goal)
        if bench.is_cuda:
            peak = torch.cuda.max_memory_allocated(bench.device) / 1e9
            yield Figure(f"{name}: peak memory", peak, "GB", f"at most {memory:g} GB", peak <= memory)
        del pipe


def _goal(bench: Bench, name: str, spent: float, goal: float) -> Figure:
    if bench.tiny:
        return Figure(name, spent, "s")
    return Figure(name, spent, "s", f"at most {goal:g} s", spent <= goal)


@torch.inference_mode()
def _uncached(bench: Bench, gpt: GPT) -> float:
    """Seconds of whole forward passes for one image, from the times at four lengths."""
    length, spent = gpt.config.block_size, 0.0
    condition = torch.randn(1, gpt.config.n_cond, device=bench.device)
    for part in range(4):
        tokens = torch.zeros(1, int(length * (part + 0.5) / 4), dtype=torch.long, device=bench.device)
        spent += seconds(bench, lambda tokens=tokens: gpt(tokens, condition), 1)
    return spent / 4 * length


def _transformers(bench: Bench, config, dtype: torch.dtype) -> float | None:
    """Seconds of transformers' generate for one image with a GPT-2 of the same sizes."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return None
    settings = GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.block_size + 1, n_embd=config.n_embd, n_layer=config.n_layer,
        n_head=config.n_head, bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(settings).to(bench.device, dtype).eval()
    start = torch.ones(1, 1, dtype=torch.long, device=bench.device)
    length = config.block_size

    @torch.inference_mode()
    def run() -> object:
        return model.generate(
            start, attention_mask=torch.ones_like(start), max_new_tokens=length, min_new_tokens=length,
            do_sample=True, top_k=PARAMS.top_k, top_p=PARAMS.top_p,
        )  # fmt: skip

    return seconds(bench, run)


def _rates(bench: Bench, dtype: torch.dtype) -> tuple[float, float]:
    """Memory bandwidth, bytes/s, and rate of matrix products, FLOP/s."""
    size = 1 << (22 if bench.tiny else 30)
    numbers = torch.ones(size // 4, device=bench.device)
    read = size / seconds(bench, numbers.sum)
    side = 512 if bench.tiny else 8192
    a, b = torch.randn(2, side, side, device=bench.device).to(dtype)
    multiply = 2 * side**3 / seconds(bench, lambda: a @ b)
    wait(bench)
    return read, multiply
