"""Quality of the mini model: 60 prompts scored by an independent judge, retrieval, reconstruction. Offline, on the CPU.

    python benchmarks/mini_quality.py [--weights weights/mini] [--data data/emoji] [--out outputs/quality] [--json]

Generates the best 4 of 16 candidates of each prompt with seed 0. An image is right when the emoji of the prompt is
among the judge's 5 nearest of 1,501 classes (`judge.py`); an image of a pair when its halves are, one each, in either
order. The distance of each image to the nearest training image shows which are copies (`originality.py`). Writes
OUT/grid.png (a green bar marks a right image, a red one a wrong one), OUT/failures.png, OUT/report.json and
OUT/report.md. The first run also fills DATA/judge.safetensors with the features of all real renders.
"""

from __future__ import annotations

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from assess import Drawn, assess, summarise
from judge import Judge, load_gallery
from measures import (
    NEAREST,
    check_prompts,
    emoji_names,
    measure_judge,
    measure_reconstruction,
    measure_retrieval,
)
from originality import NEAR_COPY, TrainingImages
from PIL import Image
from prompts import PROMPTS, Prompt, read_prompts
from rich.console import Console
from rich.progress import track
from sheets import draw_failures, draw_grid

from clipgen.images.pixels import save_image
from clipgen.pipeline import ClipGen
from clipgen.request import GenerationRequest
from clipgen.utils.entry_point import entry_point
from clipgen.utils.files import write_text

ROOT = Path(__file__).resolve().parent.parent
SEED, OUTPUTS, CANDIDATES = 0, 4, 16
COLUMNS = ("images", "best", "any", "nearest", "look", "near_copies")
BATCH = 4
"""Prompts per call, which does not affect the images."""


def generate(pipe: ClipGen, prompts: Sequence[Prompt]) -> list[tuple[list[Image.Image], list[float]]]:
    """Images and CLIP scores of each prompt, best first."""
    found = []
    console = Console(stderr=True)
    for start in track(range(0, len(prompts), BATCH), "prompts", console=console):
        requests = [GenerationRequest(p.text, OUTPUTS, CANDIDATES, seed=SEED) for p in prompts[start : start + BATCH]]
        found += [(result.images, result.scores) for result in pipe.generate(requests)]
    return found


def build_report(pipe: ClipGen, drawn: Sequence[Drawn], measured: dict[str, dict], seconds: dict) -> dict:
    """All figures, and the assessment of each prompt's images, as JSON."""
    prompts = [
        {
            "kind": d.prompt.kind,
            "prompt": d.prompt.text,
            "ranks": d.ranks,
            "nearest": d.nearest,
            "clip_scores": [round(score, 4) for score in d.scores],
            "nearest_training_images": [asdict(neighbour) for neighbour in d.neighbours],
        }
        for d in drawn
    ]
    settings = asdict(pipe.config.sampling) | {
        "num_outputs": OUTPUTS,
        "candidates": CANDIDATES,
        "seed": SEED,
        "device": str(pipe.device),
        "dtype": str(pipe.dtype).removeprefix("torch."),
    }
    report = {"kinds": summarise(drawn), **measured, "settings": settings, "seconds": seconds, "prompts": prompts}
    return json.loads(json.dumps(report), parse_float=lambda text: round(float(text), 4))


def to_markdown(report: dict) -> str:
    """Markdown tables of a report."""
    lines = [
        f"Right class among the judge's nearest {NEAREST} of {report['judge']['classes']:,}:",
        "",
        "| kind | prompts | images | best by CLIP | any of 4 | nearest is right | style or background | near copies |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, row in report["kinds"].items():
        shares = [f"{row[name]:.0%}" if name in row else "" for name in COLUMNS]
        lines.append(f"| {kind} | {row['prompts']} | {' | '.join(shares)} |")
    median = report["kinds"]["all"]["median_psnr"]
    lines += [
        "",
        f"Near copies: {NEAR_COPY:.0f} dB or more to the nearest training image; the median is {median:.1f} dB.",
    ]
    recognised = {k: v for k, v in report["judge"].items() if k != "classes"}
    lines += ["", f"The judge on real images, nearest {NEAREST}:", "", "| images | recognised |", "|---|---|"]
    lines += [f"| {name.replace('_', ' ')} | {share:.0%} |" for name, share in recognised.items()]
    retrieval, rebuilt = report["retrieval"], report["reconstruction"]
    shares = " / ".join(f"{retrieval[f'recall_{k}']:.0%}" for k in (1, 5, 10))
    lines += ["", f"CLIP finds {retrieval['images']} held-out renders by name: recall at 1 / 5 / 10 = {shares}.", ""]
    for split in ("heldout", "unseen"):
        row = rebuilt[split]
        lpips = "not available (no VGG16 weights here)" if row["lpips"] is None else f"{row['lpips']:.3f}"
        lines.append(f"VQGAN, {row['images']} {split} images: PSNR {row['psnr']:.1f} dB, LPIPS {lpips}.")
    lines.append(f"Codes used: {rebuilt['codes_used']:.1%}, perplexity {rebuilt['perplexity']:.0f}.")
    return "\n".join(lines) + "\n"


def run(weights: Path, data: Path, out: Path, prompts_file: Path = PROMPTS, dtype: str | None = None) -> dict:
    """Measure everything and write the grid and the reports.

    Raises:
        ValueError: weights, data or prompts cannot be used.
    """
    seconds, start = {}, time.perf_counter()

    def lap(stage: str) -> None:
        seconds[stage] = round(time.perf_counter() - start - sum(seconds.values()), 1)

    prompts = read_prompts(prompts_file)
    pipe = ClipGen.from_pretrained(weights, device="cpu", dtype=dtype)
    exact = ClipGen.from_pretrained(weights, device="cpu", dtype="float32")
    judge, training = Judge(), TrainingImages(data)
    gallery = load_gallery(data, judge)
    check_prompts(prompts, gallery, data)
    lap("load")
    generated = generate(pipe, prompts)
    lap("draw")
    names = emoji_names(data)
    drawn = [assess(judge, gallery, training, p, *found, names) for p, found in zip(prompts, generated, strict=True)]
    measured = {
        "judge": {"classes": len(set(gallery.codes))} | measure_judge(judge, gallery, data, prompts, exact.vqgan),
        "retrieval": measure_retrieval(exact.clip, data),
        "reconstruction": measure_reconstruction(exact.vqgan, data),
    }
    lap("judge")
    report = build_report(pipe, drawn, measured, seconds)
    save_image(draw_grid(drawn), out / "grid.png")
    if (failures := draw_failures(drawn)) is not None:
        save_image(failures, out / "failures.png")
    write_text(out / "report.json", json.dumps(report, indent=1) + "\n")
    write_text(out / "report.md", to_markdown(report))
    return report


@entry_point()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=ROOT / "weights" / "mini", help="folder of weights")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "emoji", help="what `make emoji` wrote")
    parser.add_argument("--out", type=Path, default=Path("outputs/quality"), help="folder for grid and reports")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="other prompts, in the same form")
    parser.add_argument("--dtype", help="precision for generating; by default what suits the CPU")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of tables")
    args = parser.parse_args()
    try:
        report = run(args.weights, args.data, args.out, args.prompts, args.dtype)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps(report) if args.json else to_markdown(report))
    print(f"grid and reports: {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
