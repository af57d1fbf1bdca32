"""Quality of the mini model: sampled prompts, scored by an independent judge. Offline, on the CPU.

    python benchmarks/mini_quality.py [--split test] [--out outputs/scenes]

Generates the best 4 of 16 candidates of each prompt with seed 0. Reports for each kind of prompt how many images show
its facts (`judge.py`), how much the candidates differ and how many images are near copies of composed scenes. The
upper bound is what the judge finds in real scenes of the same facts, and in these after the tokenizer. Writes
OUT/report.json, OUT/report.md, OUT/grid.png with the images of every prompt (a green bar marks a right image),
OUT/samples.png with those of the first four prompts of each kind, and OUT/failures.png with the prompts whose best
image is wrong.
"""

from __future__ import annotations

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from judge import SCENES, Judge, Verdict, checked_heads, is_right, load_judge, stands_as_said
from PIL import Image
from prompts import KINDS, SEEDS, Prompt, draw_prompts
from rich.console import Console
from rich.progress import track
from sheets import draw_row, draw_sheet
from torch import Tensor

from clipgen.evaluation.metrics import psnr
from clipgen.images.pixels import from_pixels, save_image, to_pixels
from clipgen.models.vqgan import VQGAN
from clipgen.pipeline import ClipGen
from clipgen.request import GenerationRequest
from clipgen.utils.entry_point import entry_point
from clipgen.utils.files import write_text
from train.loop.arguments import at_least
from train.mini.objects import read_objects
from train.mini.sampling import draw_facts
from train.mini.scene import Composer
from train.mini.source import Scenes, trained_scenes
from train.mini.wordnet import narrower_words

ROOT = Path(__file__).resolve().parents[1]
OUTPUTS, CANDIDATES, SEED = 4, 16, 0
COPY_SIDE, NEAR_COPY = 48, 20.0
"""Side, px, and PSNR, dB, at which an image is a near copy of a scene."""
COPIES = 50_000
"""Composed scenes that near copies are looked for among."""
_JUDGE_SEED = 11
"""Of the scenes that the judge learned from."""
_ABSENT = {"color": "its own color", "attachment": "nothing on it"}


@dataclass(frozen=True)
class Drawn:
    """A prompt, its images, best first, and the judge's verdicts."""

    prompt: Prompt
    images: list[Image.Image]
    verdicts: list[Verdict]

    @property
    def right(self) -> list[bool]:
        """Whether each image shows what the prompt asks for."""
        return [is_right(verdict, self.prompt.facts, self.prompt.kind) for verdict in self.verdicts]


def differences(images: Sequence[Image.Image]) -> float:
    """Mean absolute difference between pairs of a prompt's images, for pixels in [0, 1]."""
    arrays = [np.asarray(image, np.float32) / 255 for image in images]
    return float(np.mean([np.abs(a - b).mean() for a, b in combinations(arrays, 2)]))


def small(images: Sequence[Image.Image]) -> Tensor:
    """Images to (N, 3 * COPY_SIDE * COPY_SIDE) float32 in [0, 1]."""
    return (to_pixels(images, COPY_SIDE).flatten(1) + 1) / 2


def nearest_psnr(images: Tensor, scenes: Iterable[Tensor]) -> Tensor:
    """PSNR, dB, of each image to the nearest of all scenes: (N, P) and batches of (M, P) -> (N,)."""
    least = torch.full((len(images),), float("inf"))
    for some in scenes:
        least = torch.minimum(least, (torch.cdist(images, some).square() / images.shape[1]).amin(1))
    return -10 * torch.log10(least.clamp(min=1e-10))


def near_copies(images: Sequence[Image.Image], scenes: Scenes, count: int) -> float:
    """Share of images that are near copies of one of the first `count` scenes."""
    starts = track(range(0, count, 500), f"near copies among {count} scenes", console=Console(stderr=True))
    batches = (
        small([Image.fromarray(scenes.image(row)) for row in range(start, min(count, start + 500))]) for start in starts
    )
    return float((nearest_psnr(small(images), batches) >= NEAR_COPY).float().mean())


def look(judge: Judge, images: Sequence[Image.Image], kind: str) -> list[Verdict]:
    """The judge's verdicts on images of a kind of prompt."""
    return judge.judge_pairs(images) if kind.startswith("pair") else judge.judge(images)


def ceiling(judge: Judge, vqgan: VQGAN, composer: Composer, prompts: Sequence[Prompt]) -> dict[str, dict[str, float]]:
    """What the judge finds right in real scenes of the prompts' facts: by kind "real", "tokenizer", "psnr" (dB)."""
    rows = {}
    for kind in KINDS:
        some = [prompt for prompt in prompts if prompt.kind == kind]
        real = [Image.fromarray(composer.compose(p.facts, seed)) for seed, p in enumerate(some)]
        pixels = to_pixels(real, vqgan.config.image_size)
        with torch.inference_mode():
            rebuilt = torch.cat([vqgan(part)[0] for part in pixels.split(16)]).clamp(-1, 1)
        rows[kind] = {"psnr": float(psnr(rebuilt, pixels, 2).mean())}
        for name, images in (("real", real), ("tokenizer", from_pixels(rebuilt))):
            verdicts = look(judge, images, kind)
            right = [is_right(v, p.facts, kind) for v, p in zip(verdicts, some, strict=True)]
            rows[kind][name] = float(np.mean(right))
    return rows


def draw(pipe: ClipGen, judge: Judge, prompts: Sequence[Prompt]) -> list[Drawn]:
    """Generate and judge images of each prompt."""
    found = []
    for start in track(range(0, len(prompts), 4), "prompts", console=Console(stderr=True)):
        some = prompts[start : start + 4]
        results = pipe.generate([GenerationRequest(p.text, OUTPUTS, CANDIDATES, seed=SEED) for p in some])
        found += [
            Drawn(prompt, result.images, look(judge, result.images, prompt.kind))
            for prompt, result in zip(some, results, strict=True)
        ]
    return found


def summarise(drawn: Sequence[Drawn]) -> dict[str, dict[str, float]]:
    """Shares by kind: of right images, of right best ones, and of right pairs that are placed as the prompt says."""
    rows = {}
    for kind in KINDS:
        some = [d for d in drawn if d.prompt.kind == kind]
        if not some:
            continue
        right = [d.right for d in some]
        rows[kind] = {
            "prompts": len(some),
            "images": float(np.mean([share for row in right for share in row])),
            "best": float(np.mean([row[0] for row in right])),
            "differences": float(np.mean([differences(d.images) for d in some])),
        }
        if kind.startswith("pair"):
            there = [
                stands_as_said(verdict, d.prompt.facts)
                for d in some
                for verdict, right in zip(d.verdicts, d.right, strict=True)
                if right
            ]
            rows[kind]["as_said"] = float(np.mean(there)) if there else 0.0
    return rows


def draw_samples(drawn: Sequence[Drawn]) -> list[Image.Image]:
    """A row for each of the first four prompts of each kind."""
    first = [d for kind in KINDS for d in [d for d in drawn if d.prompt.kind == kind][:4]]
    return [draw_row(d.images, d.right, d.prompt.text) for d in first]


def seen_instead(verdict: Verdict, kind: str) -> str:
    """What the judge sees of the facts that a kind of prompt is about, in words."""
    if kind.startswith("pair"):
        return " and ".join(sorted({name for name in verdict.parts.values() if name}))
    return ", ".join(verdict.said[name] or _ABSENT[name] for name in checked_heads(kind))


def draw_failures(drawn: Sequence[Drawn]) -> list[Image.Image]:
    """A row for each prompt whose best image is wrong, with what the judge sees in that."""
    return [
        draw_row(d.images, d.right, d.prompt.text, f"taken for: {seen_instead(d.verdicts[0], d.prompt.kind)}")
        for d in drawn
        if not d.right[0]
    ]


def to_markdown(report: dict) -> str:
    """Markdown table of a report."""
    lines = [
        f"{report['split']} prompts, {OUTPUTS} of {CANDIDATES} candidates, seed {SEED}:",
        "",
        "| kind | prompts | right | best by CLIP | standing as said | candidates differ by | the judge on real scenes "
        "| after the tokenizer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, row in report["kinds"].items():
        bound = report["ceiling"][kind]
        as_said = f"{row['as_said']:.0%}" if "as_said" in row else ""
        shares = f"{row['images']:.0%} | {row['best']:.0%} | {as_said} | {row['differences']:.3f}"
        lines.append(f"| {kind} | {row['prompts']} | {shares} | {bound['real']:.0%} | {bound['tokenizer']:.0%} |")
    quality = np.mean([bound["psnr"] for bound in report["ceiling"].values()])
    lines += ["", f"Tokenizer on scenes of the prompts: PSNR {quality:.1f} dB."]
    lines.append(f"Near copies among {report['scenes']:,} composed scenes: {report['near_copies']:.0%}.")
    return "\n".join(lines) + "\n"


@entry_point()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=ROOT / "weights" / "mini", help="folder of weights")
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="the folder that `make renders` fills")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="WordNet's database")
    parser.add_argument("--out", type=Path, default=Path("outputs/scenes"), help="folder for the grid and the reports")
    parser.add_argument("--split", choices=list(SEEDS), default="development", help="which prompts")
    parser.add_argument("--per-kind", type=at_least(1), default=40, help="prompts of each kind")
    parser.add_argument("--judge-scenes", type=at_least(1), default=SCENES, help="scenes that the judge learns from")
    parser.add_argument(
        "--copies", type=at_least(1), default=COPIES, help="scenes that near copies are looked for among"
    )
    parser.add_argument("--dtype", help="precision that is drawn in; by default what suits the CPU")
    args = parser.parse_args()
    prompts = draw_prompts(args.split, args.per_kind, narrower_words(args.wordnet, read_objects().values()))
    pipe = ClipGen.from_pretrained(args.weights, device="cpu", dtype=args.dtype)
    exact = ClipGen.from_pretrained(args.weights, device="cpu", dtype="float32")
    learned = Scenes(args.data / "renders", draw_facts, _JUDGE_SEED)
    judge = load_judge(learned, args.data / "judge.safetensors", args.judge_scenes)
    drawn = draw(pipe, judge, prompts)
    images = [image for d in drawn for image in d.images]
    report = {
        "split": args.split,
        "kinds": summarise(drawn),
        "ceiling": ceiling(judge, exact.vqgan, learned.composer, prompts),
        "near_copies": near_copies(images, trained_scenes(str(args.data)), args.copies),
        "scenes": args.copies,
        "prompts": [
            {"kind": d.prompt.kind, "text": d.prompt.text, "seen": [v.said | v.parts for v in d.verdicts]}
            for d in drawn
        ],
    }
    save_image(draw_sheet([draw_row(d.images, d.right, d.prompt.text) for d in drawn]), args.out / "grid.png")
    save_image(draw_sheet(draw_samples(drawn)), args.out / "samples.png")
    if failures := draw_failures(drawn):
        save_image(draw_sheet(failures), args.out / "failures.png")
    write_text(args.out / "report.json", json.dumps(report, indent=1) + "\n")
    write_text(args.out / "report.md", to_markdown(report))
    print(to_markdown(report))


if __name__ == "__main__":
    main()
