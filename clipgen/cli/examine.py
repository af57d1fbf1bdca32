"""What can be wrong with an installation, in order: each finding in plain words, with what to do about it."""

from __future__ import annotations

import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from clipgen import __version__

if TYPE_CHECKING:
    from clipgen.pipeline import ClipGen

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements.txt"
SECONDS = 60.0
"""A picture that takes longer is worth a warning."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: str
    """ "ok", "warning", or "wrong": something will not work."""
    text: str
    figure: float | None = None
    """Of "time": seconds for a picture; of "memory": bytes that are free."""


def examine(weights: Path, device: str | None = None, dtype: str | None = None) -> Iterator[Finding]:
    """Look at the installation, the machine and the weights, then draw. What is wrong never raises."""
    yield _python()
    yield _packages(REQUIREMENTS)
    yield _memory()
    yield _threads()
    pipe: ClipGen | None = None
    try:
        pipe = _load(weights, device, dtype)
    except (ValueError, OSError, RuntimeError) as error:
        yield Finding("weights", "wrong", str(error))
    if pipe is None:
        return
    count = sum(tensor.numel() for part in (pipe.clip, pipe.gpt, pipe.vqgan) for tensor in part.state_dict().values())
    yield Finding("weights", "ok", f"{weights}: {pipe.config.name}, {count / 1e6:.1f} M numbers, as its manifest says")
    yield _coverage(weights)
    yield _device(pipe)
    yield _time(lambda: pipe("a lemon", seed=0))


def _python() -> Finding:
    found = f"clipgen {__version__}, Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if not (3, 11) <= sys.version_info < (3, 15):
        return Finding(
            "python", "wrong", f"{found}; clipgen needs Python 3.11 to 3.14: make a new environment with one"
        )
    return Finding("python", "ok", found)


def _packages(requirements: Path) -> Finding:
    """Installed versions against the exact ones in requirements.txt, which an installed wheel does not carry."""
    if not requirements.is_file():
        return Finding("packages", "ok", f"PyTorch {torch.__version__}; no requirements.txt here to compare with")
    pins = re.findall(r"^([\w.-]+)==([\w.+!-]+)", requirements.read_text(encoding="utf-8"), re.MULTILINE)
    missing, other = [], []
    for name, wanted in pins:
        try:
            found = version(name)
        except PackageNotFoundError:
            missing.append(f"{name} {wanted}")
            continue
        if found.split("+")[0] != wanted:  # 2.11.0+cpu is 2.11.0, built for CPUs
            other.append(f"{name} is {found}, {wanted} was tested")
    again = "run `make setup`, or `pip install -r requirements.txt`"
    if missing:
        return Finding("packages", "wrong", f"missing: {', '.join(missing)}; {again}")
    if other:
        return Finding("packages", "warning", f"{'; '.join(other)}: pictures may differ; {again}")
    return Finding("packages", "ok", f"all {len(pins)} as in requirements.txt, PyTorch {torch.__version__}")


def _memory() -> Finding:
    pages = {name: os.sysconf(name) for name in ("SC_PAGE_SIZE", "SC_PHYS_PAGES", "SC_AVPHYS_PAGES")}
    total, free = (pages["SC_PAGE_SIZE"] * pages[name] for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    text = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free, without what the system keeps of files"
    if total < 2e9:
        return Finding("memory", "warning", f"{text}; 2 GB are little even for the mini model", free)
    return Finding("memory", "ok", text, free)


def _threads() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    used, load = torch.get_num_threads(), os.getloadavg()[0]
    text = f"PyTorch uses {used} of {cores} cores that this process may use, load {load:.1f}"
    if used > cores:
        return Finding("threads", "warning", f"{text}: they get in each other's way; set OMP_NUM_THREADS={cores}")
    if load > 1.5 * cores:
        return Finding("threads", "warning", f"{text}: other programs are busy, so drawing is slower than it could be")
    return Finding("threads", "ok", text)


def _load(weights: Path, device: str | None, dtype: str | None) -> ClipGen:
    from clipgen.pipeline import ClipGen

    return ClipGen.from_pretrained(weights, device=device, dtype=dtype)


def _coverage(weights: Path) -> Finding:
    from clipgen.weights.training_index import TrainingIndex

    try:
        index = TrainingIndex.load(weights)
    except ValueError as error:
        return Finding("coverage", "wrong", str(error))
    if index is None:
        return Finding("coverage", "ok", "these weights have no index of training pictures, so none is compared with")
    return Finding("coverage", "ok", f"an index of {len(index.names)} training pictures")


def _device(pipe: ClipGen) -> Finding:
    from clipgen.outputs.metadata import device_name

    precision = pipe.precision
    text = f"{device_name(pipe.device)}, {precision}"
    if pipe.device.type == "cpu" and torch.cuda.is_available():
        return Finding("device", "warning", f"{text}, though there is a GPU: leave --device and CLIPGEN_DEVICE out")
    if pipe.device.type == "cpu" and precision == "bfloat16" and not torch.cpu._is_avx512_bf16_supported():
        return Finding("device", "warning", f"{text}, which is slow on this CPU: leave --dtype and CLIPGEN_DTYPE out")
    if pipe.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(pipe.device)
        text += f", {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    return Finding("device", "ok", text)


def _time(draw: Callable[[], object]) -> Finding:
    """The first picture, which warms up, and the median of up to three more within ten seconds."""
    try:
        start = time.perf_counter()
        draw()
        first = time.perf_counter() - start
        more: list[float] = []
        while len(more) < 3 and time.perf_counter() - start < 10:
            begun = time.perf_counter()
            draw()
            more.append(time.perf_counter() - begun)
    except (ValueError, RuntimeError, MemoryError) as error:
        return Finding("time", "wrong", f"drawing fails: {error}")
    usual = statistics.median(more or [first])
    text = f"a picture takes {usual:.1f} s (the first one {first:.1f} s), measured just now"
    return Finding("time", "warning" if usual > SECONDS else "ok", text, round(usual, 3))
