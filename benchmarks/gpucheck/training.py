"""Thirty steps of each training through the real scripts, and tokens encoded in half precision."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clipgen.images.pixels import to_pixels
from clipgen.models.vqgan import VQGAN
from clipgen.weights.model_dir import load_model_dir
from gpucheck.report import Bench, Figure, Skipped


def made_up_images(folder: Path, count: int, size: int = 160) -> Path:
    """Images of coloured waves, the same in every run."""
    folder.mkdir(parents=True, exist_ok=True)
    x, y = np.meshgrid(np.linspace(0, 6, size), np.linspace(0, 6, size))
    for i in range(count):
        waves = [np.sin((1 + i % 5) * x + i + c) * np.cos((1 + i % 3) * y - c) for c in range(3)]
        pixels = (127.5 + 127.5 * np.stack(waves, axis=-1)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04}.png")
    return folder


def training(bench: Bench) -> Iterator[Figure]:
    """Stage 1 with its GAN, stage 2, and FSDP, each in bf16 and fp16, through the scripts; stopped and resumed."""
    work, steps = bench.out / "training", 4 if bench.tiny else 30
    data = made_up_images(work / "data", 24 if bench.tiny else 256)
    weights = bench.root / "weights" / "mini"
    every = {"batch_size": 8, "steps": steps, "log_every": steps // 2, "sample_every": steps, "save_every": steps // 2}
    one = [f"stage1.{name}={value}" for name, value in every.items()] + ["stage1.workers=0"]
    one += ["stage1.perceptual=none", "stage1.disc_start=1"]
    two = [f"stage2.{name}={value}" for name, value in every.items()]
    two += ["stage2.workers=0", "stage2.neighbours=0", "stage2.optimizer=adamw"]
    two += ["--vqgan", str(weights), "--clip", str(weights / "clip.safetensors")]
    for precision in ("bf16", "fp16") if bench.is_cuda else ("no",):
        flags = [*one, f"stage1.precision={precision}"]
        yield from _script(
            bench, f"stage 1, {precision}", ["train/stage1.py"], data, work / f"stage1-{precision}", flags
        )
        run, flags = work / f"stage2-{precision}", [*two, f"stage2.precision={precision}"]
        yield from _script(bench, f"stage 2, {precision}", ["train/stage2.py"], data, run, flags)
        flags = [*flags, f"stage2.steps={steps + 2}"]
        yield from _script(bench, f"stage 2, {precision}, resumed", ["train/stage2.py"], data, run, flags)
    if bench.is_cuda:
        command = ["-m", "torch.distributed.run", "--nproc-per-node", "1", "train/stage2.py"]
        flags = [*two, "stage2.precision=bf16", "stage2.parallel=fsdp"]
        yield from _script(bench, "stage 2, FSDP", command, data, work / "fsdp", flags)


def _script(bench: Bench, name: str, command: list[str], data: Path, out: Path, flags: list[str]) -> Iterator[Figure]:
    full = [sys.executable, *command, "--config", "mini", "--data", str(data), "--out", str(out), *flags]
    done = subprocess.run(full, cwd=bench.root, capture_output=True, text=True, env=bench.environment, timeout=300)
    said = (done.stderr.strip().splitlines() or [""])[-1][:160]
    yield Figure(name, "ends well" if done.returncode == 0 else said, goal="ends well", met=done.returncode == 0)
    if done.returncode == 0:
        rows = csv.DictReader((out / "scalars.csv").open())
        losses = [float(row["value"]) for row in rows if row["name"] == "loss"]
        said = f"{losses[0]:.4f}, {losses[-1]:.4f}" if losses else "none logged"
        met = bool(losses) and bool(np.isfinite(losses).all())
        yield Figure(f"{name}: first and last loss", said, goal="finite", met=met)


def throughput(bench: Bench) -> Iterator[Figure]:
    """Images a second and the share of the matrix rate, by benchmarks/training.py."""
    if bench.tiny:
        raise Skipped("takes minutes on a CPU: `python benchmarks/training.py` measures it there")
    config = ["--config", "coco", "--steps", "5"]
    command = [sys.executable, "benchmarks/training.py", "--json", *config]
    done = subprocess.run(command, cwd=bench.root, capture_output=True, text=True, env=bench.environment, timeout=400)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    results = {r["part"]: r for r in json.loads(done.stdout.splitlines()[-1])["results"]}
    for part, found in results.items():
        goal, met = "", None
        if part == "stage 2, from tokens":
            goal, met = "at least 45 %", found["share"] >= 0.45
        if found["share"] is not None:
            yield Figure(f"{part}: share of the matrix rate", 100 * found["share"], "%", goal, met)
        yield Figure(f"{part}: images/s", found["images_per_s"])
    plain, fast = (results.get(f"stage 1, {name}") for name in ("plain", "channels-last"))
    if plain and fast:
        ratio = fast["images_per_s"] / plain["images_per_s"]
        yield Figure("stage 1 against the plain recipe", ratio, "x", "at least 2 x", ratio >= 2)


@torch.inference_mode()
def encoding(bench: Bench) -> Iterator[Figure]:
    """Tokens of the GPU in bfloat16 against the CPU's in float32."""
    config, parts = load_model_dir(bench.root / "weights" / "mini")
    vqgan = VQGAN(config.vqgan).eval()
    vqgan.load_state_dict({name: tensor.float() for name, tensor in parts["vqgan"].items()})
    folder = made_up_images(bench.out / "encoding", 8)
    images = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]
    pixels = to_pixels(images, config.vqgan.image_size)
    exact = vqgan.encode_tokens(pixels)
    vqgan.to(bench.device)
    with torch.autocast(bench.device.type, torch.bfloat16):
        rounded = vqgan.encode_tokens(pixels.to(bench.device)).cpu()
    same = (exact == rounded).float().mean().item()
    yield Figure("equal tokens, bfloat16 against float32 on the CPU", 100 * same, "%", "at least 90 %", same >= 0.9)
