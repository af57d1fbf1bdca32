"""Time and memory of converting, loading and generating with full-size models, each in a fresh process.

    python benchmarks/full_size.py [--model coco|imagenet] [--dtype bfloat16] [--candidates 1] [--keep DIR] [--json]

The weights are random, with the names, shapes and dtypes of the published files (listed in `tests/golden`), so the
figures are those of the real ones and the images are noise. coco writes 2.2 GB, and as much again when converting;
imagenet 4.0 GB twice, with its GPT (GPT2-XL, which nobody has published) in bfloat16.
"""

from __future__ import annotations

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clipgen.utils.entry_point import entry_point
from train.loop.arguments import at_least

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
Listing = dict[str, tuple[list[int], str]]


def listing(name: str) -> Listing:
    """Names, shapes and dtypes of a published state dict: vqgan, gpt2_medium, gpt2_large, clip_vit_b32, taming."""
    if name == "taming":
        return json.loads((GOLDEN / "taming_vqgan_imagenet_f16_16384_state_dict.json").read_text())
    return json.loads((GOLDEN / "hfailab_v0.1.0_state_dicts.json").read_text())[name]


def fill(entries: Iterable[tuple[str, tuple[list[int], str]]]) -> dict[str, Any]:
    """Random tensors of the listed shapes, small enough that activations stay finite; the same at every call."""
    import torch

    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02
    tensors = {}
    for name, (shape, dtype) in entries:
        count = math.prod(shape)
        values = noise.repeat(-(-count // len(noise)))[:count].reshape(shape)
        if re.search(r"(norm|ln_)\w*\.weight$|block\.[03]\.weight$|final\.0\.weight$", name):
            values = torch.ones(shape)
        tensors[name] = values.to(getattr(torch, dtype), copy=True)  # a slice would be saved with all of its storage
    return tensors


def write_published(folder: Path, model: str) -> dict[str, Path]:
    """Write files in their publishers' formats with random weights; imagenet's GPT in that of stage 2."""
    import torch
    from safetensors.torch import save_file

    files = {"clip": folder / "clip_vit_b32.pt", "vqgan": folder / "vqgan.pt", "gpt": folder / "gpt.pt"}
    torch.save(fill(listing("clip_vit_b32").items()), files["clip"])
    if model == "coco":
        torch.save({"model": fill(listing("vqgan").items()), "epoch": 1}, files["vqgan"])
        torch.save({"model": fill(listing("gpt2_medium").items()), "epoch": 1}, files["gpt"])
        return files
    from clipgen.models.gpt import GPT
    from train.config import load_config

    torch.save({"state_dict": fill(listing("taming").items()), "global_step": 1}, files["vqgan"])
    with torch.device("meta"):
        shapes = {n: list(t.shape) for n, t in GPT(load_config(model).model.gpt).state_dict().items()}
    files["gpt"] = folder / "gpt.safetensors"
    save_file(fill((name, (shape, "bfloat16")) for name, shape in shapes.items()), files["gpt"])
    return files


class Meter:
    """Seconds and peak memory, GB, of this process during named steps.

    "cpu_seconds" is the computing time of all cores together, which is more reliable on a busy machine. "private"
    memory is held by the process alone; "resident" adds pages of mapped files, which the system shares and reclaims.
    """

    def __init__(self) -> None:
        self.steps: dict[str, dict[str, float]] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measure the block inside."""
        peak = {"private": 0, "resident": 0}
        stop = threading.Event()

        def watch() -> None:
            while True:
                fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
                kilobytes = {key: int(fields[key].split()[0]) for key in ("RssAnon", "VmRSS")}
                peak["private"] = max(peak["private"], kilobytes["RssAnon"])
                peak["resident"] = max(peak["resident"], kilobytes["VmRSS"])
                if stop.wait(0.005):
                    return

        thread = threading.Thread(target=watch)
        thread.start()
        start, cpu_start = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
            stop.set()
            thread.join()
            memory = {f"{kind}_gb": round(value * 1024 / 1e9, 2) for kind, value in peak.items()}
            self.steps[name] = {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), **memory}


def convert(files: dict[str, Path], out: Path, model: str) -> dict[str, Any]:
    """Measure converting published files."""
    meter = Meter()
    with meter.step("import"):
        from clipgen.weights.convert import convert_checkpoints
    with meter.step("convert"):
        convert_checkpoints(files["clip"], files["vqgan"], files["gpt"], out, model)
    return meter.steps


def draw(folder: Path, dtype: str | None, candidates: int) -> dict[str, Any]:
    """Measure loading a folder of weights and generating one image."""
    meter = Meter()
    with meter.step("import"):
        import torch

        from clipgen.pipeline import ClipGen
    with meter.step("load"):
        pipe = ClipGen.from_pretrained(folder, dtype=dtype)
    with meter.step("draw"):
        result = pipe("a lemon", candidates=candidates, seed=0)
    stages = {name: round(seconds, 2) for name, seconds in result.seconds.items()}
    report: dict[str, Any] = {**meter.steps, "stages": stages, "device": str(pipe.device), "dtype": str(pipe.dtype)}
    if pipe.device.type == "cuda":
        report["gpu"] = torch.cuda.get_device_name(pipe.device)
        report["gpu_peak_gb"] = round(torch.cuda.max_memory_reserved(pipe.device) / 1e9, 2)
    return report | {"threads": torch.get_num_threads(), "candidates": candidates}


def in_fresh_process(function: Callable[..., Any], **arguments: Any) -> Any:
    """Call a function of this file in a new Python process, so that earlier steps do not affect its memory."""
    code = (
        f"import sys, json; sys.path[:0] = {[str(ROOT), str(ROOT / 'benchmarks')]!r}\n"
        "from pathlib import Path, PosixPath\nimport full_size\n"
        f"print(json.dumps(full_size.{function.__name__}(**{arguments!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@entry_point()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["coco", "imagenet"], default="coco", help="which size")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; by default what suits the device")
    parser.add_argument("--candidates", type=at_least(1), default=1, help="images to generate")
    parser.add_argument("--keep", type=Path, help="folder for the converted weights, which are deleted without it")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="full-size-") as name:
        out = args.keep or Path(name) / "converted"
        published = Path(name) / "published"
        published.mkdir()
        files = write_published(published, args.model)
        sizes = {part: file.stat().st_size for part, file in files.items()}
        report = in_fresh_process(convert, files=files, out=out, model=args.model)
        shutil.rmtree(published)
        report = {"model": args.model, "published_bytes": sizes, "convert": report["convert"]}
        report["folder_bytes"] = sum(file.stat().st_size for file in out.iterdir())
        report["draw"] = in_fresh_process(draw, folder=out, dtype=args.dtype, candidates=args.candidates)
    if args.json:
        print(json.dumps(report))
        return
    for key, value in report.items():
        print(f"{key}: {value}")


if __name__ == "__main__":
    main()
