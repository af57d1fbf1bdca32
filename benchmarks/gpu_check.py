"""Checks of a GPU: kernels, numerics, robustness, speed and training, one figure per line with its verdict.

    python benchmarks/gpu_check.py --minutes 6 --out runs/gpu-check      (make gpu-check)

A failing stage does not end the others, and each is recorded when it ends: DIR/results.jsonl, and at the end
results.json and results.md. A stage that leaves the GPU unusable is followed by a fresh process for the rest. Exit code
1 where a goal is missed or a stage failed. `--device cpu` runs what a CPU can, at tiny sizes: it checks the script, not
the machine.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]  # run from anywhere, installed or not

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

import argparse  # noqa: E402
import os  # noqa: E402
import time  # noqa: E402

import torch  # noqa: E402
from gpucheck import kernels, numerics, speed, training  # noqa: E402
from gpucheck.report import Bench, Outcome, Stage, append, read, run_stage, write_report  # noqa: E402

from clipgen.utils.entry_point import entry_point  # noqa: E402
from clipgen.weights.precision import pick_device  # noqa: E402

STAGES: dict[str, Stage] = {
    "facts": kernels.facts,
    "attention": kernels.attention,
    "graphs": kernels.graphs,
    "no sync": kernels.no_sync,
    "tokens": numerics.tokens,
    "precision": numerics.precision,
    "ranges": numerics.ranges,
    "race": numerics.race,
    "nan": numerics.nan,
    "decoding": speed.decoding,
    "images": speed.images,
    "training": training.training,
    "throughput": training.throughput,
    "encoding": training.encoding,
}


def is_usable(device: torch.device) -> bool:
    """Whether the device still responds."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return True
    except RuntimeError:
        return False


@entry_point()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the results; an earlier check in it goes on"
    )
    parser.add_argument("--minutes", type=float, default=6.0, help="no stage is started after this time")
    parser.add_argument("--device", help="cuda, cuda:1, cpu; a GPU by default where there is one")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=list(STAGES), help="all by default")
    args = parser.parse_args()
    device = pick_device(args.device)
    bench = Bench(device, tiny=device.type != "cuda", out=args.out.resolve(), root=ROOT)
    start = float(os.environ.get("GPU_CHECK_START") or time.time())
    for name in args.stages:
        if any(outcome.stage == name for outcome in read(bench.out)):
            continue
        print(name, flush=True)
        if time.time() - start > 60 * args.minutes:
            outcome = Outcome(name, "skipped", note=f"the {args.minutes:g} minutes were over")
        else:
            outcome = run_stage(name, STAGES[name], bench)
        append(bench.out, outcome)
        print(f"  {outcome.state} in {outcome.seconds:.1f} s {outcome.note}", flush=True)
        if not is_usable(device):  # only a new process gets a new CUDA context; it goes on behind this stage
            os.environ["GPU_CHECK_START"] = str(start)
            os.execv(sys.executable, [sys.executable, *sys.argv])
    outcomes = read(bench.out)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, tiny sizes"
    write_report(bench.out, outcomes, f"GPU check: {machine}, torch {torch.__version__}")
    print(f"{bench.out / 'results.md'}: " + ", ".join(f"{o.stage} {o.state}" for o in outcomes if o.state != "ok"))
    sys.exit(1 if any(outcome.state in ("short", "failed") for outcome in outcomes) else 0)


if __name__ == "__main__":
    main()
