"""Stages 1 to 4: the machine, attention backends, CUDA graphs, and steps without synchronisation."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from clipgen.engine.batch import Batch
from clipgen.engine.cuda_graphs import build_graphs
from gpucheck.models import preset, random_gpt, sequences, wait
from gpucheck.report import Bench, Figure, Skipped

GPU_TESTS = ("tests/unit/engine/test_cuda_graphs.py", "tests/unit/models/test_clip.py")


def facts(bench: Bench) -> Iterator[Figure]:
    """Facts about the machine, and the GPU tests of the test suite."""
    yield Figure("PyTorch, Python", f"{torch.__version__}, {platform.python_version()}")
    yield Figure("CPU", torch.backends.cpu.get_cpu_capability())
    if bench.is_cuda:
        properties = torch.cuda.get_device_properties(bench.device)
        yield Figure("GPU", properties.name)
        yield Figure("capability", f"sm_{properties.major}{properties.minor}")
        yield Figure("memory", properties.total_memory / 1e9, "GB")
        yield Figure("CUDA, cuDNN", f"{torch.version.cuda}, {torch.backends.cudnn.version()}")
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        yield Figure("driver", subprocess.run(query, capture_output=True, text=True).stdout.strip())
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *GPU_TESTS]
    done = subprocess.run(tests, cwd=bench.root, capture_output=True, text=True, env=bench.environment)
    if done.returncode not in (0, 1):
        raise Skipped(f"pytest could not run: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped)", done.stdout)}
    goal = "none fails" + (" or is skipped" if bench.is_cuda else "")
    met = done.returncode == 0 and not (bench.is_cuda and counts.get("skipped"))
    yield Figure("GPU tests of the suite", str(counts), goal=goal, met=met)


def attention(bench: Bench) -> Iterator[Figure]:
    """Backend that scaled_dot_product_attention chooses for one query, and the cost of a new length."""
    if not bench.is_cuda:
        raise Skipped("backends are chosen on GPUs")
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q = torch.randn(8, 16, 1, 64, device=bench.device, dtype=torch.float16)
    cases: dict[str, list[SDPBackend]] = {
        "default": [
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.MATH,
        ],
        "without cuDNN": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
        "efficient or math": [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    }
    for name, backends in cases.items():
        first, second = 0.0, 0.0
        with sdpa_kernel(backends):
            for length in range(33, 53):
                k = torch.randn(8, 16, length, 64, device=bench.device, dtype=torch.float16)
                first += _call_seconds(bench, q, k)
                second += _call_seconds(bench, q, k)
        yield Figure(f"{name}: first call, second call of 20 new lengths", f"{first * 50:.3f}, {second * 50:.3f}", "ms")
    k = torch.randn(8, 16, 64, 64, device=bench.device, dtype=torch.float16)
    yield Figure("backend taken by default", SDPBackend(torch._fused_sdp_choice(q, k, k)).name)


def _call_seconds(bench: Bench, q: torch.Tensor, k: torch.Tensor) -> float:
    wait(bench)
    start = time.perf_counter()
    F.scaled_dot_product_attention(q, k, k)
    wait(bench)
    return time.perf_counter() - start


def graphs(bench: Bench) -> Iterator[Figure]:
    """CUDA graphs at full size: whether they are built without a warning, and their time and memory."""
    if not bench.is_cuda:
        raise Skipped("CUDA graphs need a GPU")
    for dtype in (torch.float16, torch.bfloat16):
        if dtype == torch.bfloat16 and torch.cuda.get_device_capability(bench.device)[0] < 8:
            continue
        gpt = random_gpt(preset(bench), bench.device, dtype)
        before, start = torch.cuda.memory_allocated(bench.device), time.perf_counter()
        runner = build_graphs(gpt, 160)
        spent = time.perf_counter() - start
        name = str(dtype).removeprefix("torch.")
        yield Figure(f"{name}: built", runner is not None, goal="yes", met=runner is not None)
        yield Figure(f"{name}: time to build", spent, "s", "at most 5 s", spent <= 5)
        yield Figure(f"{name}: memory", (torch.cuda.memory_allocated(bench.device) - before) / 1e9, "GB")
        del gpt, runner
        torch.cuda.empty_cache()


@torch.inference_mode()
def no_sync(bench: Bench) -> Iterator[Figure]:
    """Whether steps of the batch never wait for the device."""
    config = preset(bench)
    batch = Batch(random_gpt(config, bench.device, torch.float16 if bench.is_cuda else torch.float32))
    batch.add(sequences(4, config), max_rows=8)
    steps = min(200, config.gpt.block_size - 2)
    batch.step()
    if bench.is_cuda:
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(steps):
            batch.step()
    finally:
        if bench.is_cuda:
            torch.cuda.set_sync_debug_mode("default")
    yield Figure("steps without waiting for the device", steps, goal="no error", met=True)
