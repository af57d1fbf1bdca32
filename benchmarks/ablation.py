"""Ablation of stage 2 on a part of the emoji, with the same number of steps for each variant. Offline, on the CPU.

    python benchmarks/ablation.py [--weights weights/mini] [--data data/emoji] [--out outputs/ablation] [--steps 800]

Trains small GPTs with train/stage2.py on `--images` glossy (3D) emoji, those of the prompts among them, with the tokens
and embeddings of --weights. The judge of `mini_quality.py` then scores 4 images per prompt, generated from the images'
own embeddings, from sentences, and from sentences moved by the index of training images. After an interruption, the
same command continues. Writes OUT/report.json, OUT/report.md and OUT/curves.png.
"""

from __future__ import annotations

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence, Set
from dataclasses import asdict
from pathlib import Path

from judge import Gallery, Judge, load_gallery
from measures import rate
from omegaconf import OmegaConf
from plot import plot
from prompts import Prompt, read_prompts

from clipgen.images.pixels import load_image
from clipgen.pipeline import ClipGen
from clipgen.request import GenerationRequest
from clipgen.request import Prompt as PromptInput
from clipgen.utils.entry_point import entry_point
from clipgen.utils.files import write_text
from clipgen.weights.prior import IndexPrior
from train.config import load_config
from train.mini.words import read_records

ROOT = Path(__file__).resolve().parent.parent
OUTPUTS, BATCH = 4, 16
KINDS = ("object", "synonym")
GUIDANCE = {1.0, 1.5, 2.0, 3.0, 4.0, 6.0}
"""Values that are compared with the model's own."""
SOURCES = ("images", "sentences", "index")

BASE = {"noise_angle": 14.3, "condition_dropout": 0.1, "clip_weight": 0.0, "neighbours": 0}
VARIANTS = {
    "base": {},
    "noise 0": {"noise_angle": 0.0},
    "noise 0.1 rad": {"noise_angle": 5.7},
    "noise 0.44 rad": {"noise_angle": 25.0},
    "no dropout": {"condition_dropout": 0.0},
    "lambda 0.2": {"clip_weight": 0.2, "clip_every": 4},
}
"""Changes to BASE, whose noise is 0.25 rad."""


def choose_images(data: Path, prompts: Sequence[Prompt], count: int, out: Path) -> dict[str, Path]:
    """Copy `count` glossy images, one per emoji and those of the prompts first, into out/images.

    Returns:
        The copy of each emoji, by code.

    Raises:
        ValueError: none of them shows the emoji of a prompt.
    """
    prompted = {code for prompt in prompts for code in prompt.groups[0]}
    records = [r for r in read_records(data / "stage2") if r["style"] == "3d" and r["background"] == "white"]
    records = [*{record["objects"][0]: record for record in records}.values()]
    records.sort(key=lambda record: record["objects"][0] not in prompted)
    chosen = records[:count]
    codes = {record["objects"][0] for record in chosen}
    if missing := [prompt.text for prompt in prompts if not codes & set(prompt.groups[0])]:
        raise ValueError(f"{len(chosen)} images show none of: {', '.join(missing)}; give more --images")
    folder = out / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for record in chosen:
        shutil.copyfile(data / "stage2" / record["file_name"], folder / record["file_name"])
    shutil.copyfile(data / "emoji.jsonl", out / "emoji.jsonl")
    write_text(folder / "metadata.jsonl", "".join(json.dumps(record) + "\n" for record in chosen))
    return {record["objects"][0]: folder / record["file_name"] for record in chosen}


def script(name: str, *arguments: str | Path) -> None:
    """Run a training script.

    Raises:
        subprocess.CalledProcessError: the script failed.
    """
    command = [sys.executable, "-m", name, *map(str, arguments)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def train(name: str, changes: dict[str, float], networks: Sequence[str | Path], out: Path) -> Path:
    """Train and export a GPT with the training scripts; the folder with its curves, its weights in "weights"."""
    folder = out / name.replace(" ", "-")
    overrides = [f"stage2.{key}={value}" for key, value in (BASE | changes).items()]
    script("train.stage2", *networks, "--data", out / "encoded", "--out", folder, *overrides)
    weights = folder / "weights"
    shutil.rmtree(weights, ignore_errors=True)
    script("train.export", *networks, "--gpt", folder, "--out", weights)
    script("train.mini.index", "--weights", weights, "--encoded", out / "encoded", "--data", out / "images")
    return folder


def recognition_rate(
    pipe: ClipGen,
    judge: Judge,
    gallery: Gallery,
    prompts: Sequence[Prompt],
    inputs: Sequence[PromptInput],
    guidance: float,
) -> float:
    """Share of images in which the judge recognises the emoji of the prompt.

    Args:
        inputs: what the image of each prompt is generated from.
    """
    images = []
    for start in range(0, len(inputs), BATCH):
        batch = inputs[start : start + BATCH]
        requests = [GenerationRequest(prompt, OUTPUTS, guidance=guidance, seed=0) for prompt in batch]
        images += [image for result in pipe.generate(requests) for image in result.images]
    right = [prompt.groups[0] for prompt in prompts for _ in range(OUTPUTS)]
    return rate(gallery.ranks(judge.features(images), right))


def measure(
    folder: Path,
    judge: Judge,
    gallery: Gallery,
    prompts: Sequence[Prompt],
    files: dict[str, Path],
    guidances: Set[float],
) -> dict[str, dict[str, float]]:
    """Recognition rates by source of the condition and by guidance.

    Args:
        folder: of the variant, as `train` returns it.
        files: an image of each emoji, by code.
        guidances: values for sentences besides the model's own.
    """
    pipe = ClipGen.from_pretrained(folder / "weights")
    found, default = {}, pipe.config.sampling.guidance
    sentences: list[PromptInput] = [prompt.text for prompt in prompts]
    images: list[PromptInput] = [load_image(next(files[c] for c in p.groups[0] if c in files)) for p in prompts]
    for source in SOURCES:
        pipe.prior = IndexPrior(pipe.index) if source == "index" else None
        inputs = images if source == "images" else sentences
        values = {default} if source == "images" else {default, *guidances}
        found[source] = {f"{g:g}": recognition_rate(pipe, judge, gallery, prompts, inputs, g) for g in sorted(values)}
    return found


def read_curve(folder: Path) -> list[tuple[float, float]]:
    """Points (step, loss on held-out images in nats per token) of a training."""
    with (folder / "scalars.csv").open() as file:
        return [(float(row["step"]), float(row["value"])) for row in csv.DictReader(file) if row["name"] == "held_loss"]


def to_markdown(report: dict) -> str:
    """Tables of losses and recognition rates."""
    lines = ["| | held-out loss | images | sentences | index |", "|---|---|---|---|---|"]
    default = f"{report['guidance']:g}"
    for name, row in report["variants"].items():
        shares = [f"{row['recognised'][source][default]:.0%}" for source in SOURCES]
        lines.append(f"| {name} | {row['held_loss']:.3f} | {' | '.join(shares)} |")
    for name, row in report["variants"].items():
        if len(row["recognised"]["index"]) > 1:
            lines += ["", f"| {name}, guidance | {' | '.join(row['recognised']['index'])} |"]
            lines.append("|---" * (1 + len(row["recognised"]["index"])) + "|")
            for source in SOURCES[1:]:
                shares = [f"{share:.0%}" for share in row["recognised"][source].values()]
                lines.append(f"| {source} | {' | '.join(shares)} |")
    return "\n".join(lines) + "\n"


@entry_point()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=ROOT / "weights" / "mini", help="its CLIP and VQGAN are used")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "emoji", help="what `make emoji` wrote")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "ablation", help="folder for runs and report")
    parser.add_argument("--images", type=int, default=256, help="emoji to train on")
    parser.add_argument("--steps", type=int, default=800, help="steps of each GPT, of 32 images")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps is {args.steps}; give 1 or more")
    prompts = [prompt for prompt in read_prompts() if prompt.kind in KINDS]
    judge = Judge()
    try:
        gallery = load_gallery(args.data, judge)
        files = choose_images(args.data, prompts, args.images, args.out)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    config = load_config("mini")
    config.model.gpt.n_layer, config.model.gpt.n_embd = 4, 192
    config.stage2.steps, config.stage2.warmup = args.steps, args.steps // 20
    config.stage2.log_every = config.stage2.sample_every = config.stage2.save_every = max(1, args.steps // 8)
    OmegaConf.save(OmegaConf.create(asdict(config)), args.out / "config.yaml")
    clip = args.weights / "clip.safetensors"
    networks = ["--config", args.out / "config.yaml", "--vqgan", args.weights, "--clip", clip]
    script("train.encode", *networks, "--data", args.out / "images", "--out", args.out / "encoded")

    report = {"images": len(files), "steps": args.steps, "guidance": config.model.sampling.guidance, "variants": {}}
    curves = {}
    for name, changes in VARIANTS.items():
        folder = train(name, changes, networks, args.out)
        curves[name] = read_curve(folder)
        guidances = GUIDANCE if name in ("base", "no dropout") else set()
        found = measure(folder, judge, gallery, prompts, files, guidances)
        report["variants"][name] = {"held_loss": curves[name][-1][1], "recognised": found}
        write_text(args.out / "report.json", json.dumps(report, indent=1) + "\n")
        write_text(args.out / "report.md", to_markdown(report))
    plot(curves, "loss on held-out images, nats per token, against steps", args.out / "curves.png")
    print(to_markdown(report))


if __name__ == "__main__":
    main()
