"""Models for the stages: the shipped weights, and full sizes with random weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from clipgen.config import ModelConfig, load_preset
from clipgen.engine.sequence import Sequence
from clipgen.models.clip import Clip, OpenAIClip
from clipgen.models.gpt import GPT
from clipgen.models.meta_init import meta_init
from clipgen.models.vqgan import VQGAN
from clipgen.pipeline import ClipGen
from clipgen.request import SamplingParams
from gpucheck.report import Bench

PARAMS = SamplingParams(temperature=1.0, top_k=500, top_p=0.95)


def preset(bench: Bench, name: str = "coco") -> ModelConfig:
    """Configuration of a published model, or of a tiny one on a CPU."""
    config = load_preset(name)
    if not bench.tiny:
        return config
    gpt = replace(config.gpt, n_layer=2, n_head=2, n_embd=64, vocab_size=256, block_size=64, n_cond=32)
    vqgan = replace(
        config.vqgan,
        image_size=64,
        ch=32,
        ch_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        attn_resolutions=[],
        codebook_size=256,
    )
    return ModelConfig(name=f"{name}, tiny", vqgan=vqgan, gpt=gpt, sampling=config.sampling)


def random_gpt(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> GPT:
    """A GPT with random weights, in eval mode."""
    with meta_init():
        gpt = GPT(config.gpt)
    return fill(gpt, device).to(dtype)


def random_pipeline(bench: Bench, dtype: torch.dtype, name: str = "coco") -> ClipGen:
    """A whole pipeline with random weights: as fast as the real one, with noise for images."""
    config = preset(bench, name)
    size = config.gpt.n_cond
    with meta_init():
        vqgan = VQGAN(config.vqgan)
        tower = OpenAIClip(size, 32, 2, 64, 16, 77, 49408, 64, 1, 2) if bench.tiny else vit_b32(size)
    clip = Clip.from_state_dict(fill(tower, bench.device).state_dict(), bench.device, dtype)
    return ClipGen(config, clip, random_gpt(config, bench.device, dtype), fill(vqgan, bench.device).to(dtype))


def vit_b32(size: int) -> nn.Module:
    """A CLIP ViT-B/32."""
    return OpenAIClip(size, 224, 12, 768, 32, 77, 49408, 512, 8, 12)


def fill(module: nn.Module, device: torch.device) -> nn.Module:
    """Give a network from the meta device small random weights, its norms ones; the same on every device."""
    module = module.to_empty(device=device).eval().requires_grad_(False)
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(device)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.ndim == 1 and name.endswith("weight"):
            tensor.fill_(1)
        elif tensor.is_floating_point():
            scale = 0.02 if tensor.ndim < 3 else (2 / tensor[0].numel()) ** 0.5 / 2
            for part in tensor.view(-1).split(len(noise)):
                part.copy_(noise[: len(part)] * scale)
    return module


def sequences(count: int, config: ModelConfig, params: SamplingParams = PARAMS) -> list[Sequence]:
    """Sequences whose conditions and seeds follow from their numbers."""
    generator = torch.Generator().manual_seed(1)
    conditions = F.normalize(torch.randn(count, config.gpt.n_cond, generator=generator), dim=1)
    return [Sequence(condition, seed, params) for seed, condition in enumerate(conditions)]


def seconds(bench: Bench, call: Callable[[], object], repeats: int = 3) -> float:
    """Lowest seconds of a call, after a warm-up call."""
    call()
    times = []
    for _ in range(repeats):
        wait(bench)
        start = time.perf_counter()
        call()
        wait(bench)
        times.append(time.perf_counter() - start)
    return min(times)


def wait(bench: Bench) -> None:
    """Wait until the device has finished its queued work."""
    if bench.is_cuda:
        torch.cuda.synchronize(bench.device)
