"""Time that a user waits for 4 images of 16 candidates, cold and warm.

    python benchmarks/end_to_end.py [--weights weights/mini] [--repeats 5] [--json]

Cold: a fresh `clipgen generate` until its first image is on disk (its files may be in the system's cache, as they are
after installing). Warm: further calls of a loaded pipeline by stage, with the time to save PNG files.
"""

from __future__ import annotations

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from clipgen.errors import UnavailableError
from clipgen.utils.cpu import usable_cores
from clipgen.utils.entry_point import entry_point
from train.loop.arguments import at_least

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "a lemon"
OUTPUTS, CANDIDATES = 4, 16
TIMEOUT = 300


def time_cold(weights: Path) -> dict[str, float]:
    """Seconds from the start of a fresh process to its first image on disk, and to its end.

    Raises:
        UnavailableError: the process failed, or wrote no image within TIMEOUT seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [sys.executable, "-m", "clipgen", "generate", PROMPT, "--json", "--seed", "0"]
        command += ["--num-outputs", str(OUTPUTS), "--candidates", str(CANDIDATES)]
        command += ["--weights", str(weights.resolve()), "--device", "cpu", "--out", str(out)]
        with (Path(folder) / "log").open("w+b") as log:
            start = time.perf_counter()
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=log)
            first = None
            while process.poll() is None and time.perf_counter() - start < TIMEOUT:
                # Images are renamed into place when they are complete.
                if first is None and any(out.rglob("*.png")):
                    first = time.perf_counter() - start
                time.sleep(0.005)
            process.kill()
            code = process.wait()
            end = time.perf_counter() - start
            if code != 0:
                log.seek(0)
                message = log.read().decode(errors="replace").strip()
                said = f"`{' '.join(command[1:4])}` ended with {code} after {end:.0f} s: {message[-500:]}"
                raise UnavailableError(said)
        return {"first_image": end if first is None else first, "exit": end}


def time_warm(weights: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of each stage in this process: import, load, first call, and the median of `repeats` further calls."""
    start = time.perf_counter()
    from clipgen.images.pixels import save_image
    from clipgen.pipeline import ClipGen

    imported = time.perf_counter()
    pipe = ClipGen.from_pretrained(weights, device="cpu")
    loaded = time.perf_counter()

    def call(seed: int) -> dict[str, float]:
        begin = time.perf_counter()
        result = pipe(PROMPT, num_outputs=OUTPUTS, candidates=CANDIDATES, seed=seed)
        generated = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            for i, image in enumerate(result.images):
                save_image(image, Path(folder) / f"{i}.png")
        end = time.perf_counter()
        return result.seconds | {"save": end - generated, "total": end - begin}

    first = call(0)
    calls = [call(seed) for seed in range(1, repeats + 1)]
    return {
        "start": {"import": imported - start, "load": loaded - imported},
        "first_call": first,
        "next_call": {stage: statistics.median(c[stage] for c in calls) for stage in first},
    }


def describe_machine() -> dict[str, object]:
    """Hardware and software that the figures depend on."""
    import torch

    from clipgen.models.capabilities import instruction_set

    return {
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
    }


def to_table(report: dict) -> str:
    """A report as text."""
    lines = [f"{OUTPUTS} of {CANDIDATES} candidates; machine: {json.dumps(report['machine'])}", ""]
    cold = report["cold"]
    lines.append(f"cold  first image on disk {cold['first_image']:.2f} s, process ends {cold['exit']:.2f} s")
    for name, stages in report["warm"].items():
        parts = ", ".join(f"{stage} {seconds:.3f}" for stage, seconds in stages.items())
        lines.append(f"warm  {name}: {parts} s")
    return "\n".join(lines)


@entry_point()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=ROOT / "weights" / "mini", help="folder of weights")
    parser.add_argument("--repeats", type=at_least(1), default=5, help="warm calls; their median is shown")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    cold, warm = time_cold(args.weights), time_warm(args.weights, args.repeats)
    report = {"cold": cold, "warm": warm, "machine": describe_machine()}
    print(json.dumps(report) if args.json else to_table(report))


if __name__ == "__main__":
    main()
