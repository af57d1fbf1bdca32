"""How good the mini model is: 60 prompts under an independent judge, retrieval, reconstruction. Offline, on the CPU.

    python benchmarks/mini_quality.py [--weights weights/mini] [--data data/emoji] [--out outputs/quality] [--json]

Draws 4 of 16 candidates of each prompt with seed 0. A picture is right when the emoji that the prompt asks for is among
the judge's 5 nearest of 1,501 classes (`judge.py`); a picture of a pair when its halves are, one each, in either order.
Writes OUT/grid.png (a green bar: right, a red one: wrong), OUT/report.json and OUT/report.md. The first run also fills
DATA/judge.safetensors with the features of all real renders.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from judge import Gallery, Judge, border_colour, load_gallery
from measures import (
    NEAREST,
    check_prompts,
    measure_judge,
    measure_reconstruction,
    measure_retrieval,
    pair_ranks,
    rate,
    summarise_codes,
)
from PIL import Image, ImageDraw, ImageFont
from prompts import KINDS, PROMPTS, Prompt, read_prompts
from rich.console import Console
from rich.progress import track

from clipgen.images import grid, save_image
from clipgen.pipeline import ClipGen
from clipgen.request import Request
from train.captions import COLOURS

ROOT = Path(__file__).resolve().parent.parent
SEED, OUTPUTS, CANDIDATES = 0, 4, 16
AT_ONCE = 4
"""Prompts drawn together; it changes nothing in the pictures."""
LINE_ART_CHROMA = 0.06
"""Mean difference of a pixel's largest and smallest channel, of 1, below which a picture is black and white."""
CELL = 112
"""Side of a picture in the grid, px."""


@dataclass(frozen=True)
class Drawn:
    """One prompt's pictures, best first, with CLIP's scores, the right class's ranks and, where asked, their look."""

    prompt: Prompt
    images: list[Image.Image]
    scores: list[float]
    ranks: list[int]
    nearest: list[str]
    """The judge's nearest class of each picture (of a pair's picture: of all of it)."""
    look: list[bool] | None
    """Whether each picture has the background colour or the black lines that the prompt asks for."""


def draw(pipe: ClipGen, prompts: Sequence[Prompt]) -> list[tuple[list[Image.Image], list[float]]]:
    """Pictures and scores of each prompt."""
    found = []
    console = Console(stderr=True)
    for start in track(range(0, len(prompts), AT_ONCE), "prompts", console=console):
        requests = [Request(p.text, OUTPUTS, CANDIDATES, seed=SEED) for p in prompts[start : start + AT_ONCE]]
        found += [(result.images, result.scores) for result in pipe.generate(requests)]
    return found


def assess(
    judge: Judge,
    gallery: Gallery,
    prompt: Prompt,
    images: list[Image.Image],
    scores: list[float],
    names: dict[str, str],
) -> Drawn:
    """Judge the pictures of one prompt."""
    features = judge.features(images)
    if prompt.kind == "pair":
        ranks = pair_ranks(judge, gallery, images, prompt.groups)
    else:
        ranks = gallery.ranks(features, [prompt.groups[0]] * len(images))
    similarity, classes = gallery.similarities(features)
    nearest = [names.get(classes[i], classes[i]) for i in similarity.argmax(1).tolist()]
    return Drawn(prompt, images, scores, ranks, nearest, check_look(prompt, images))


def check_look(prompt: Prompt, images: Sequence[Image.Image]) -> list[bool] | None:
    """Black lines where they were asked for, or the asked background; None where the prompt asks for neither."""
    if prompt.line_art:
        return [chroma(image) < LINE_ART_CHROMA for image in images]
    if prompt.background:
        return [background_name(image) == prompt.background for image in images]
    return None


def chroma(image: Image.Image) -> float:
    """Mean difference of the largest and the smallest channel, in [0, 1]: 0 for grey pictures."""
    x = np.asarray(image.convert("RGB")).astype(np.float32) / 255
    return float((x.max(2) - x.min(2)).mean())


def background_name(image: Image.Image) -> str | None:
    """Name of the nearest of the training's background colours; None when the border has no one colour."""
    colour, share = border_colour(image)
    if share < 0.5:
        return None
    return min(COLOURS, key=lambda name: float(np.square(colour - np.array(COLOURS[name])).sum()))


def summarise(drawn: Sequence[Drawn]) -> dict[str, dict[str, float]]:
    """By kind: share of right pictures (`images`), of right best-scored pictures (`best`), of prompts with any."""
    table = {}
    for kind in (*KINDS, "all"):
        rows = [d for d in drawn if kind in (d.prompt.kind, "all")]
        if not rows:
            continue
        table[kind] = {
            "prompts": len(rows),
            "images": rate([rank for d in rows for rank in d.ranks]),
            "nearest": rate([rank for d in rows for rank in d.ranks], nearest=1),
            "best": rate([d.ranks[0] for d in rows]),
            "any": rate([min(d.ranks) for d in rows]),
        }
        looks = [look for d in rows if d.look for look in d.look]
        if looks and kind != "all":
            table[kind]["look"] = sum(looks) / len(looks)
    return table


def draw_grid(drawn: Sequence[Drawn], columns: int = 3) -> Image.Image:
    """Four pictures of each prompt side by side, a bar under each that says whether it is right, and the prompt."""
    font = ImageFont.load_default(size=14)
    blocks = []
    for d in drawn:
        row = grid([image.resize((CELL, CELL), Image.Resampling.LANCZOS) for image in d.images], columns=OUTPUTS)
        block = Image.new("RGB", (row.width + 14, CELL + 30), "white")
        block.paste(row)
        pen = ImageDraw.Draw(block)
        for i, rank in enumerate(d.ranks):
            colour = (40, 160, 70) if rank < NEAREST else (205, 60, 50)
            pen.rectangle((i * (CELL + 2), CELL + 1, i * (CELL + 2) + CELL - 1, CELL + 4), fill=colour)
        pen.text((0, CELL + 7), d.prompt.text, fill="black", font=font)
        blocks.append(block)
    return grid(blocks, columns=columns, gap=0)


def build_report(pipe: ClipGen, drawn: Sequence[Drawn], measured: dict[str, dict], seconds: dict) -> dict:
    """All numbers, and for each prompt what the judge saw."""
    prompts = [
        {
            "kind": d.prompt.kind,
            "prompt": d.prompt.text,
            "ranks": d.ranks,
            "nearest": d.nearest,
            "clip_scores": [round(score, 4) for score in d.scores],
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
    """The report's tables."""
    lines = [
        f"Right class among the judge's nearest {NEAREST} of {report['judge']['classes']:,}:",
        "",
        "| kind | prompts | images | best by CLIP | any of 4 | nearest is right | style or background |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, row in report["kinds"].items():
        shares = [f"{row[name]:.0%}" if name in row else "" for name in ("images", "best", "any", "nearest", "look")]
        lines.append(f"| {kind} | {row['prompts']} | {' | '.join(shares)} |")
    recognised = {k: v for k, v in report["judge"].items() if k != "classes"}
    lines += ["", f"The judge on real pictures, nearest {NEAREST}:", "", "| pictures | recognised |", "|---|---|"]
    lines += [f"| {name.replace('_', ' ')} | {share:.0%} |" for name, share in recognised.items()]
    retrieval, rebuilt = report["retrieval"], report["reconstruction"]
    shares = " / ".join(f"{retrieval[f'recall_{k}']:.0%}" for k in (1, 5, 10))
    lines += ["", f"CLIP finds {retrieval['pictures']} held-out renders by name: recall at 1 / 5 / 10 = {shares}.", ""]
    for split in ("heldout", "unseen"):
        row = rebuilt[split]
        lpips = "not available (no VGG16 weights here)" if row["lpips"] is None else f"{row['lpips']:.3f}"
        lines.append(f"VQGAN, {row['pictures']} {split} pictures: PSNR {row['psnr']:.1f} dB, LPIPS {lpips}.")
    lines.append(f"Codes used: {rebuilt['codes_used']:.1%}, perplexity {rebuilt['perplexity']:.0f}.")
    return "\n".join(lines) + "\n"


def write_text(text: str, path: Path) -> None:
    """Write under a temporary name, then rename."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def run(weights: Path, data: Path, out: Path, prompts_file: Path = PROMPTS) -> dict:
    """Measure everything and write the grid and the reports.

    Raises:
        ValueError: weights, data or prompts that cannot be used.
    """
    seconds, start = {}, time.perf_counter()

    def lap(stage: str) -> None:
        seconds[stage] = round(time.perf_counter() - start - sum(seconds.values()), 1)

    prompts = read_prompts(prompts_file)
    pipe = ClipGen.from_pretrained(weights, device="cpu")
    exact = ClipGen.from_pretrained(weights, device="cpu", dtype="float32")
    judge = Judge()
    gallery = load_gallery(data, judge)
    check_prompts(prompts, gallery, data)
    lap("load")
    pictures = draw(pipe, prompts)
    lap("draw")
    names = summarise_codes(data)
    drawn = [assess(judge, gallery, p, *found, names) for p, found in zip(prompts, pictures, strict=True)]
    measured = {
        "judge": {"classes": len(set(gallery.codes))} | measure_judge(judge, gallery, data, prompts, exact.vqgan),
        "retrieval": measure_retrieval(exact.clip, data),
        "reconstruction": measure_reconstruction(exact.vqgan, data),
    }
    lap("judge")
    report = build_report(pipe, drawn, measured, seconds)
    save_image(draw_grid(drawn), out / "grid.png")
    write_text(json.dumps(report, indent=1) + "\n", out / "report.json")
    write_text(to_markdown(report), out / "report.md")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=ROOT / "weights" / "mini", help="folder of weights")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "emoji", help="what `make emoji` wrote")
    parser.add_argument("--out", type=Path, default=Path("outputs/quality"), help="folder for grid and reports")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="other prompts, in the same form")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of tables")
    args = parser.parse_args()
    try:
        report = run(args.weights, args.data, args.out, args.prompts)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps(report) if args.json else to_markdown(report))
    print(f"grid and reports: {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
