"""Stages 5 to 9: tokens with and without graphs, precisions, ranges of half precision, races, NaN."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from clipgen.engine.batch import Batch
from clipgen.engine.engine import Engine
from clipgen.engine.sequence import Sequence
from clipgen.models.gpt import GPT
from clipgen.models.vqgan import VQGAN
from clipgen.pipeline import ClipGen
from clipgen.request import SamplingParams
from clipgen.weights.model_dir import load_model_dir
from gpucheck.models import seconds, sequences
from gpucheck.report import Bench, Figure
from train.loop.samples import generate_tokens

HALF_MAX = 65_504.0
PROMPTS = ("a lemon", "a red heart", "a cat", "sketch of a dog")


def mini_gpt(bench: Bench, device: str) -> GPT:
    """The shipped GPT in float32."""
    config, parts = load_model_dir(bench.root / "weights" / "mini")
    gpt = GPT(config.gpt).eval().requires_grad_(False)
    gpt.load_state_dict({name: tensor.float() for name, tensor in parts["gpt"].items()})
    return gpt.to(device)


def tokens(bench: Bench) -> Iterator[Figure]:
    """Greedy tokens of sequences that join and leave: graphs against eager steps, the GPU against the CPU."""
    config, _ = load_model_dir(bench.root / "weights" / "mini")
    greedy = sequences(4 if bench.tiny else 12, config, SamplingParams(temperature=0.0))
    device = str(bench.device)
    gpt = mini_gpt(bench, device)
    eager = generate_tokens(
        gpt, torch.stack([seq.condition for seq in greedy]).to(device), range(len(greedy)), greedy[0].params
    )
    engine = Engine(gpt)
    threads, found = [], {}
    for part in (greedy[:2], greedy[2:]):
        run = threading.Thread(target=lambda part=part: found.update(_generate(engine, part)))
        threads.append(run)
        run.start()
    for run in threads:
        run.join()
    joined = torch.stack([found[seq] for seq in greedy]).to(eager)
    same = (joined == eager).float().mean().item()
    yield Figure("engine against one eager batch, equal tokens", 100 * same, "%", "at least 99 %", same >= 0.99)
    if bench.is_cuda:
        few = greedy[:4]
        cpu = generate_tokens(mini_gpt(bench, "cpu"), torch.stack([s.condition for s in few]), range(4), few[0].params)
        same = (cpu == eager[:4].cpu()).float().mean().item()
        yield Figure("GPU against CPU, equal tokens", 100 * same, "%", "at least 95 %", same >= 0.95)


def _generate(engine: Engine, part: list[Sequence]) -> dict[Sequence, Tensor]:
    return dict(zip(part, engine.generate(part).tokens, strict=True))


@torch.inference_mode()
def precision(bench: Bench) -> Iterator[Figure]:
    """Next tokens of each precision, given the tokens of float32, and seconds per step."""
    weights = bench.root / "weights" / "mini"
    exact = ClipGen.from_pretrained(weights, device=str(bench.device), dtype="float32")
    conditions = torch.stack([exact.embed(text) for text in PROMPTS])
    params = exact.config.sampling
    written = exact.engine.generate([Sequence(c, i, params) for i, c in enumerate(conditions)]).tokens
    expected = _next_logits(exact.gpt, conditions, written)
    for name in ("float16", "bfloat16", "int8"):
        try:
            pipe = ClipGen.from_pretrained(weights, device=str(bench.device), dtype=name)
        except ValueError as error:
            yield Figure(name, str(error))
            continue
        found = _next_logits(pipe.gpt, conditions, written)
        divergence = nn.functional.kl_div(found, expected, log_target=True, reduction="none").sum(-1).mean().item()
        same = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
        yield Figure(f"{name}: divergence from float32", divergence, "nats", "at most 0.02", divergence <= 0.02)
        yield Figure(f"{name}: same likeliest token", 100 * same, "%")
        step = seconds(bench, lambda pipe=pipe: generate_tokens(pipe.gpt, conditions, range(4), params), 1)
        yield Figure(f"{name}: a step of 4 images", 1e3 * step / pipe.config.gpt.block_size, "ms")


def _next_logits(gpt: GPT, conditions: Tensor, written: Tensor) -> Tensor:
    """Log probabilities of the first 40 tokens, by the cached path: (B, 40, V)."""
    batch = Batch(gpt)
    batch.add(
        [Sequence(c, 0, SamplingParams(), tokens[:-1]) for c, tokens in zip(conditions, written, strict=True)], 64
    )
    kept: list[Tensor] = []
    decode = batch.decode_step
    batch.decode_step = lambda *args: (kept.append(decode(*args).float().clone()), kept[-1])[1]  # type: ignore[assignment]
    for _ in range(40):
        batch.step()
    return torch.stack(kept, dim=1).log_softmax(-1)


@torch.inference_mode()
def ranges(bench: Bench) -> Iterator[Figure]:
    """Largest activations of VQGAN and CLIP against float16's range, and the pixels that half precision gives."""
    pipe = ClipGen.from_pretrained(bench.root / "weights" / "mini", device=str(bench.device), dtype="float32")
    output = pipe.engine.generate([Sequence(pipe.embed(text), 0, pipe.config.sampling) for text in PROMPTS])
    peaks: dict[str, float] = {}

    def watch(name: str) -> None:
        def hook(module: nn.Module, args: object, out: object) -> None:
            if isinstance(out, Tensor):
                peaks[name] = max(peaks.get(name, 0.0), out.abs().max().item())

        for part, module in vars(pipe)[name].named_modules():
            if not list(module.children()) and part:
                module.register_forward_hook(hook)

    for name in ("vqgan", "clip"):
        watch(name)
    exact = pipe.vqgan.decode_tokens(output.tokens).clamp(-1, 1)
    pipe.clip.encode_image(torch.zeros(1, 3, pipe.clip.image_size, pipe.clip.image_size, device=bench.device))
    for name, peak in peaks.items():
        yield Figure(f"{name}: largest activation", peak, "", f"below {HALF_MAX:.0f}", peak < HALF_MAX)
    half = torch.float16 if bench.is_cuda else torch.bfloat16
    rounded = VQGAN(pipe.config.vqgan).to(bench.device).eval()
    rounded.load_state_dict(load_model_dir(bench.root / "weights" / "mini")[1]["vqgan"])
    found = rounded.to(half).decode_tokens(output.tokens).float().clamp(-1, 1)
    mean = (found - exact).abs().mean().item() * 127.5
    yield Figure("mean pixel difference in half precision", mean, "of 255", "below 2", mean < 2)


def race(bench: Bench) -> Iterator[Figure]:
    """First calls of a fresh pipeline by eight threads at once, several times."""
    same, graphs, rounds = 0, 0, 1 if bench.tiny else 5
    for _ in range(rounds):
        pipe = ClipGen.from_pretrained(bench.root / "weights" / "mini", device=str(bench.device), dtype="float32")
        barrier, found = threading.Barrier(8), {}

        def call(i: int, pipe: ClipGen = pipe, barrier: threading.Barrier = barrier, found: dict = found) -> None:
            barrier.wait()
            found[i] = np.asarray(pipe(PROMPTS[i % 4], seed=i).images[0], int)

        threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        alone = {i: np.asarray(pipe(PROMPTS[i % 4], seed=i).images[0], int) for i in range(8)}
        same += sum(i in found and np.abs(found[i] - alone[i]).mean() < 0.5 for i in range(8))
        graphs += pipe.engine.graphs is not None
    count = f"{same} of {8 * rounds}"
    yield Figure("requests with the images of sequential ones", count, goal="9 in 10", met=same >= 7.2 * rounds)
    if bench.is_cuda:
        yield Figure("pipelines with CUDA graphs", f"{graphs} of {rounds}", goal="all", met=graphs == rounds)


NAN = """
import sys, torch
from clipgen import ClipGen
from clipgen.errors import EngineError
pipe = ClipGen.from_pretrained(sys.argv[1], device=sys.argv[2], dtype="float32")
bias = pipe.gpt.head.bias
kept = bias.clone()
with torch.inference_mode():
    bias[3] = torch.nan
try:
    pipe("a lemon", seed=0)
    print("no error")
except EngineError as error:
    with torch.inference_mode():
        bias.copy_(kept)
    pipe("a lemon", seed=0)
    print("next request works", pipe.is_healthy)
"""


def nan(bench: Bench) -> Iterator[Figure]:
    """NaN in the GPT's head, in a process of its own: the request fails and the next one works."""
    weights = str(bench.root / "weights" / "mini")
    done = subprocess.run(
        [sys.executable, "-c", NAN, weights, str(bench.device)],
        cwd=bench.root,
        env=bench.environment,
        capture_output=True,
        text=True,
    )
    said = done.stdout.strip() or done.stderr.strip().splitlines()[-1:] or "nothing"
    yield Figure(
        "after NaN logits", str(said), goal="next request works True", met="next request works True" in str(said)
    )
