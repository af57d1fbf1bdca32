"""`clipgen doctor`: check the installation, the machine and the weights, and say what to do about each problem."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from clipgen import __version__
from clipgen.cli.common import FILES, Device, Dtype, Weights, find_weights, option, printable
from clipgen.utils.cpu import cpu_quota, describe_waiting, thread_count, usable_cores

if TYPE_CHECKING:
    from clipgen.pipeline import ClipGen

EXAMPLE = "Example: clipgen doctor --weights weights/mini"
REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements.txt"
SLOW_SECONDS = 60.0
"""Seconds per image from which the user is warned."""
_SHORT_WAITS = "unset OMP_WAIT_POLICY, GOMP_SPINCOUNT and KMP_BLOCKTIME"
_INSTALL = "run `make setup`, or `pip install -r requirements.txt`"
_SIGNS = {"ok": "ok", "warning": "note", "wrong": "WRONG"}


def doctor(
    weights: Weights = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Annotated[bool, option(FILES, "Print one JSON object: ok, and the findings.", "--json")] = False,
) -> None:
    """Check the installation, the machine and the weights, and draw an image.

    Exit code 0: it works, perhaps with notes; 1: something is wrong.
    """
    findings = []
    for finding in diagnose(weights, device, dtype):
        findings.append(finding)
        if not as_json:
            print(f"{_SIGNS[finding.state]:>5}  {finding.name:9}{printable(finding.text)}", flush=True)
    wrong = sum(finding.state == "wrong" for finding in findings)
    if as_json:
        print(json.dumps({"ok": not wrong, "findings": [asdict(finding) for finding in findings]}))
    else:
        print(f"{wrong} wrong" if wrong else "everything works")
    raise typer.Exit(1 if wrong else 0)


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    state: Literal["ok", "warning", "wrong"]
    """ "wrong" means that something will not work."""
    text: str
    figure: float | None = None
    """For "time", seconds per image; for "memory", free bytes."""


def diagnose(weights: str | None, device: str | None, dtype: str | None) -> Iterator[Finding]:
    """Run all checks in order and yield their findings. Problems are reported as findings, never raised."""
    found = f"clipgen {__version__}, Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    yield Finding("python", "ok", found)
    try:
        yield check_packages(REQUIREMENTS)
        yield check_memory()
        yield check_cpu()
        yield check_threads()
        yield from check_model(weights, device, dtype)
    except ImportError as error:
        yield Finding("packages", "wrong", f"{error}; {_INSTALL}")


def check_model(weights: str | None, device: str | None, dtype: str | None) -> Iterator[Finding]:
    """Load the model and draw with it."""
    from clipgen.pipeline import ClipGen
    from clipgen.weights.describe import describe_model_dir
    from clipgen.weights.resolve import find_default

    try:
        folder = find_weights(weights)
        named = f"--weights or CLIPGEN_WEIGHTS names {weights}"
        reason = named if weights else f"none is named, and {find_default()[1]}"
        pipe = ClipGen.from_pretrained(folder, device=device, dtype=dtype)
    except (ValueError, OSError, RuntimeError) as error:
        yield Finding("weights", "wrong", str(error))
        return
    count = describe_model_dir(folder)["parameters"]  # of the files: packed weights are no parameters of the module
    size = f"{pipe.config.name}, {count / 1e6:.1f} M parameters, files as in the manifest"
    yield Finding("weights", "ok", f"{folder}: {size}; used because {reason}")
    yield check_training_index(pipe)
    yield check_device(pipe)
    yield time_images(lambda: pipe("a lemon", seed=0))


def check_packages(requirements: Path) -> Finding:
    """Compare installed versions with the pins of requirements.txt, which an installed wheel does not carry."""
    if not requirements.is_file():
        return Finding("packages", "ok", f"PyTorch {version('torch')}; no requirements.txt here to compare with")
    pins = re.findall(r"^([\w.-]+)==([\w.+!-]+)", requirements.read_text(encoding="utf-8"), re.MULTILINE)
    missing, different = [], []
    for name, wanted in pins:
        try:
            found = version(name)
        except PackageNotFoundError:
            missing.append(f"{name} {wanted}")
            continue
        if found.split("+")[0] != wanted:  # 2.11.0+cpu is 2.11.0, built for CPUs
            different.append(f"{name} is {found}, {wanted} was tested")
    if missing:
        return Finding("packages", "wrong", f"missing: {', '.join(missing)}; {_INSTALL}")
    if different:
        return Finding("packages", "warning", f"{'; '.join(different)}: images may differ; {_INSTALL}")
    return Finding("packages", "ok", f"all {len(pins)} as in requirements.txt, PyTorch {version('torch')}")


def check_memory() -> Finding:
    """Report the main memory that is free, also by a container's limit, and warn below 2 GB in total."""
    import torch

    from clipgen.utils.memory import free_bytes

    total, free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), free_bytes(torch.device("cpu"))
    text = f"{'an unknown part' if free is None else f'{free / 1e9:.1f}'} of {total / 1e9:.1f} GB free"
    if total < 2e9:
        return Finding("memory", "warning", f"{text}; 2 GB are little even for the mini model", free)
    return Finding("memory", "ok", text, free)


def check_cpu() -> Finding:
    """Name the instruction set that products run on, and the precisions that follow from it."""
    from clipgen.models.capabilities import cpu_dtypes, dot_product_bits, has_bfloat16, instruction_set

    default, *others = cpu_dtypes()
    text = f"{instruction_set()}: on the CPU, {default} is the default and {', '.join(others)} are possible"
    if not has_bfloat16():
        text += "; bfloat16, which is about twice as fast, needs AVX512-BF16 or AMX"
    if dot_product_bits() == 7:
        text += "; int8 rounds activations to 7 bits, because this CPU has no VNNI"
    return Finding("cpu", "ok", text)


def check_threads() -> Finding:
    """Compare PyTorch's threads with the cores and the quota of this process, and warn of a busy machine."""
    import torch

    cores, quota, load = usable_cores(), cpu_quota(), os.getloadavg()[0]
    threads = thread_count(torch.get_num_threads())
    text = f"{threads} threads on {cores} cores that this process may use, load {load:.1f}"
    if quota is not None:
        text += f", a quota of {quota:g} CPUs"
    allowed = min(cores, math.ceil(quota or cores))
    if threads > allowed:
        return Finding("threads", "warning", f"{text}: they slow each other down; set CLIPGEN_THREADS={allowed}")
    if load > 1.5 * cores:
        return Finding("threads", "warning", f"{text}: other programs are busy, so drawing is slower than it could be")
    if "PASSIVE" not in describe_waiting():
        return Finding("threads", "warning", f"{text}: idle ones spin, slow beside other programs; {_SHORT_WAITS}")
    return Finding("threads", "ok", f"{text}; idle ones sleep ({describe_waiting()})")


def check_training_index(pipe: ClipGen) -> Finding:
    """Name the number of training images in the index, if the weights have one."""
    if pipe.index is None:
        return Finding("coverage", "ok", "these weights have no index of training images to compare prompts with")
    return Finding("coverage", "ok", f"an index of {len(pipe.index.names)} training images")


def check_device(pipe: ClipGen) -> Finding:
    """Name the device and precision in use, and warn where a better choice is available."""
    import torch

    from clipgen.models.capabilities import has_bfloat16
    from clipgen.outputs.metadata import device_name
    from clipgen.weights.precision import explain_unusable_gpu

    text = f"{device_name(pipe.device)}, {pipe.precision}"
    if pipe.device.type == "cpu" and torch.cuda.is_available():
        return Finding("device", "warning", f"{text}, though there is a GPU: leave --device and CLIPGEN_DEVICE out")
    if pipe.device.type == "cpu" and (problem := explain_unusable_gpu()):
        return Finding("device", "warning", f"{text}: {problem}")
    if pipe.device.type == "cpu" and pipe.precision == "bfloat16" and not has_bfloat16():
        return Finding("device", "warning", f"{text}, which is slow on this CPU: leave --dtype and CLIPGEN_DTYPE out")
    if pipe.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(pipe.device)
        text += f", {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    return Finding("device", "ok", text)


def time_images(draw: Callable[[], object]) -> Finding:
    """Time the first image, which warms up, and the median of up to three more within ten seconds."""
    try:
        started = time.perf_counter()
        draw()
        first = time.perf_counter() - started
        repeats: list[float] = []
        while len(repeats) < 3 and time.perf_counter() - started < 10:
            begun = time.perf_counter()
            draw()
            repeats.append(time.perf_counter() - begun)
    except (ValueError, RuntimeError, MemoryError) as error:
        return Finding("time", "wrong", f"drawing fails: {error}")
    median = statistics.median(repeats or [first])
    text = f"an image takes {median:.1f} s (the first one {first:.1f} s), measured just now"
    return Finding("time", "warning" if median > SLOW_SECONDS else "ok", text, round(median, 3))
