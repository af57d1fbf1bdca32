"""Trainings that take a moment, in this process or in processes of their own."""

from __future__ import annotations

import csv
import importlib
import math
import multiprocessing
import os
import random
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from omegaconf import OmegaConf
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from clipgen.config import ModelConfig
from clipgen.utils.listening import usable_address
from train.config import Config, Stage1Config, Stage2Config

# Importing torch takes seconds: one server imports it once, and every process is forked from it.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["train.stage1", "train.stage2", "train.encode"])


def write_images(folder: Path) -> Path:
    """Write two dozen coloured shapes into nested folders, and one file that is not an image."""
    rng = random.Random(0)
    for i in range(24):
        image = Image.new("RGB", (40, 48), tuple(rng.randrange(256) for _ in range(3)))
        ImageDraw.Draw(image).ellipse([4, 8, 36, 40], fill=tuple(rng.randrange(256) for _ in range(3)))
        path = folder / f"{i % 3}" / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
    (folder / "broken.jpg").write_bytes(b"not an image")
    return folder


def write_config(model: ModelConfig, path: Path) -> Path:
    """Write a configuration: six steps of each stage in float32, the last three of stage 1 with the GAN."""
    common = {"steps": 6, "batch_size": 4, "warmup": 1, "precision": "no", "workers": 0, "ema": 0.5}
    every = {"log_every": 1, "sample_every": 3, "save_every": 3}
    values = Config(
        model=model,
        stage1=Stage1Config(**common, **every, perceptual="none", disc_start=3, disc_ch=8, revive_every=2, lr=1e-3),
        stage2=Stage2Config(
            **common, **every, lr=1e-3, optimizer="muon", noise_angle=20.0, neighbours=2, token_noise=0.5, views=2
        ),
    )
    OmegaConf.save(OmegaConf.structured(values), path)
    return path


def run(script, monkeypatch, *arguments: object) -> None:
    """Call a script's main with arguments, in this process."""
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
    script.main()


def scalars(out: Path) -> dict[tuple[int, str], float]:
    """Logged scalars of a training: (step, name) -> value."""
    with (out / "scalars.csv").open() as file:
        return {(int(r["step"]), r["name"]): float(r["value"]) for r in csv.DictReader(file)}


def same_curves(one: Path, other: Path, *required: tuple[int, str]) -> None:
    """Assert that two trainings logged the same scalars, to 1e-4, except for speed, and that `required` are logged."""
    first, second = ({k: v for k, v in scalars(out).items() if k[1] != "images_per_second"} for out in (one, other))
    assert set(required) <= first.keys() and first.keys() == second.keys()
    for key, value in first.items():
        assert math.isclose(second[key], value, rel_tol=1e-4, abs_tol=1e-4), key


def same_weights(a: Path, b: Path) -> bool:
    """Whether two .safetensors files hold bit-identical tensors."""
    first, second = load_file(a), load_file(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def start(
    script: str, arguments: Sequence[object], log: Path, environment: dict[str, str] | None = None, file_limit: int = 0
) -> BaseProcess:
    """Start `python -m SCRIPT ARGUMENTS` in a process of its own, on one thread.

    Args:
        log: file that its output is appended to.
        file_limit: size, bytes, at which files stop growing, as on a full disk; 0 for no limit.
    """
    parts = (script, [str(a) for a in arguments], str(log), environment or {}, file_limit)
    process = _CONTEXT.Process(target=_main, args=parts)
    process.start()
    return process


def _main(script: str, arguments: list[str], log: str, environment: dict[str, str], file_limit: int) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    sys.argv = [script, *arguments]
    code = 0
    try:
        importlib.import_module(script).main()
    except SystemExit as stop:
        code = stop.code
    # A Gloo thread that frees a tensor during shutdown aborts the process, once in some dozens of trainings. PyTorch's
    # state of a sharded model keeps idle Gloo threads; so does an error, whose exit code is not 0 anyway.
    left = [name for name in _thread_names() if "gloo" in name]
    assert not left or code == 2 or "stage2.parallel=fsdp" in arguments, f"Gloo threads {left} are still running"
    sys.exit(code)


def _thread_names() -> Iterator[str]:
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # the thread has ended meanwhile
            yield path.read_text()


def finish(process: BaseProcess, seconds: float = 300) -> int:
    """Wait for a process and return its exit code, negative if a signal ended it."""
    process.join(seconds)
    assert process.exitcode is not None, "it did not end in time"
    return process.exitcode


def start_together(script: str, arguments: Sequence[object], log: Path, processes: int) -> list[BaseProcess]:
    """Start one training of several processes, as torchrun does."""
    host, port = usable_address("127.0.0.1", 0)
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": host, "MASTER_PORT": str(port)}
    return [
        start(script, arguments, log, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]
