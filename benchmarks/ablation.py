"""What each part of stage 2's recipe brings, on a part of the emoji, with the same steps for each. Offline, on the CPU.

    python benchmarks/ablation.py [--weights weights/mini] [--data data/emoji] [--out outputs/ablation] [--steps 800]

Trains small GPTs through train/stage2.py on `--pictures` glossy (3D) emoji, those of the prompts among them, with the
tokens and embeddings of --weights. `mini_quality.py`'s judge then looks at what each draws, 4 pictures a prompt:
from the pictures' own embeddings, from sentences, and from sentences by way of the index of training pictures.
Stopped, the same command goes on. Writes OUT/report.json, OUT/report.md and OUT/curves.png.
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
from clipgen.request import Prompt as Asked
from clipgen.utils.entry_point import entry_point
from clipgen.utils.files import write_text
from train.config import load_config
from train.mini.words import read_records

ROOT = Path(__file__).resolve().parent.parent
OUTPUTS, AT_ONCE = 4, 16
KINDS = ("object", "synonym")
GUIDANCE = {1.0, 1.5, 2.0, 3.0, 4.0, 6.0}
"""Tried beside the model's own."""
SOURCES = ("pictures", "sentences", "index")

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


def choose_pictures(data: Path, prompts: Sequence[Prompt], count: int, out: Path) -> dict[str, Path]:
    """Copy `count` glossy pictures, one of each emoji, the prompts' first, into out/pictures; their files by code.

    Raises:
        ValueError: there is no picture of what a prompt asks for among them.
    """
    asked = {code for prompt in prompts for code in prompt.groups[0]}
    records = [r for r in read_records(data / "stage2") if r["style"] == "3d" and r["background"] == "white"]
    records = [*{record["objects"][0]: record for record in records}.values()]
    records.sort(key=lambda record: record["objects"][0] not in asked)
    chosen = records[:count]
    codes = {record["objects"][0] for record in chosen}
    if missing := [prompt.text for prompt in prompts if not codes & set(prompt.groups[0])]:
        raise ValueError(f"{len(chosen)} pictures show none of: {', '.join(missing)}; give more --pictures")
    folder = out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    for record in chosen:
        shutil.copyfile(data / "stage2" / record["file_name"], folder / record["file_name"])
    shutil.copyfile(data / "emoji.jsonl", out / "emoji.jsonl")
    write_text(folder / "metadata.jsonl", "".join(json.dumps(record) + "\n" for record in chosen))
    return {record["objects"][0]: folder / record["file_name"] for record in chosen}


def script(name: str, *arguments: str | Path) -> None:
    """Run one of the training's own scripts.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    command = [sys.executable, "-m", name, *map(str, arguments)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def train(name: str, changes: dict[str, float], networks: Sequence[str | Path], out: Path) -> Path:
    """A GPT through the real scripts; the folder that its curves are in, and its weights in a folder inside."""
    folder = out / name.replace(" ", "-")
    overrides = [f"stage2.{key}={value}" for key, value in (BASE | changes).items()]
    script("train.stage2", *networks, "--data", out / "encoded", "--out", folder, *overrides)
    weights = folder / "weights"
    shutil.rmtree(weights, ignore_errors=True)
    script("train.export", *networks, "--gpt", folder, "--out", weights)
    script("train.mini.index", "--weights", weights, "--encoded", out / "encoded", "--data", out / "pictures")
    return folder


def recognised(
    pipe: ClipGen, judge: Judge, gallery: Gallery, prompts: Sequence[Prompt], asked: Sequence[Asked], guidance: float
) -> float:
    """Share of the pictures in which the judge finds what was asked for."""
    images = []
    for start in range(0, len(asked), AT_ONCE):
        some = asked[start : start + AT_ONCE]
        requests = [GenerationRequest(prompt, OUTPUTS, guidance=guidance, seed=0) for prompt in some]
        images += [image for result in pipe.generate(requests) for image in result.images]
    right = [prompt.groups[0] for prompt in prompts for _ in range(OUTPUTS)]
    return rate(gallery.ranks(judge.features(images), right))


def measure(
    folder: Path,
    tools: tuple[Judge, Gallery],
    prompts: Sequence[Prompt],
    files: dict[str, Path],
    more: Set[float],
) -> dict[str, dict[str, float]]:
    """The share recognised, by where the condition comes from and by guidance: the model's own, sentences at more."""
    pipe = ClipGen.from_pretrained(folder / "weights")
    index, found, default = pipe.index, {}, pipe.config.sampling.guidance
    sentences: list[Asked] = [prompt.text for prompt in prompts]
    own: list[Asked] = [load_image(next(files[c] for c in p.groups[0] if c in files)) for p in prompts]
    for source in SOURCES:
        pipe.index = index if source == "index" else None
        asked = own if source == "pictures" else sentences
        tried = {default} if source == "pictures" else {default, *more}
        found[source] = {f"{g:g}": recognised(pipe, *tools, prompts, asked, g) for g in sorted(tried)}
    return found


def curve(folder: Path) -> list[tuple[float, float]]:
    """The loss on pictures held out, nats per token, against steps."""
    with (folder / "scalars.csv").open() as file:
        return [(float(row["step"]), float(row["value"])) for row in csv.DictReader(file) if row["name"] == "held_loss"]


def to_markdown(report: dict) -> str:
    """The tables."""
    lines = ["| | held-out loss | pictures | sentences | index |", "|---|---|---|---|---|"]
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
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "emoji", help="what `make emoji` made")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "ablation", help="folder for everything")
    parser.add_argument("--pictures", type=int, default=256, help="emoji to learn")
    parser.add_argument("--steps", type=int, default=800, help="of each GPT, 32 pictures each")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps is {args.steps}; give 1 or more")
    prompts = [prompt for prompt in read_prompts() if prompt.kind in KINDS]
    judge = Judge()
    try:
        gallery = load_gallery(args.data, judge)
        files = choose_pictures(args.data, prompts, args.pictures, args.out)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    config = load_config("mini")
    config.model.gpt.n_layer, config.model.gpt.n_embd = 4, 192
    config.stage2.steps, config.stage2.warmup = args.steps, args.steps // 20
    config.stage2.log_every = config.stage2.sample_every = config.stage2.save_every = max(1, args.steps // 8)
    OmegaConf.save(OmegaConf.create(asdict(config)), args.out / "config.yaml")
    clip = args.weights / "clip.safetensors"
    networks = ["--config", args.out / "config.yaml", "--vqgan", args.weights, "--clip", clip]
    script("train.encode", *networks, "--data", args.out / "pictures", "--out", args.out / "encoded")

    report = {"pictures": len(files), "steps": args.steps, "guidance": config.model.sampling.guidance, "variants": {}}
    curves = {}
    for name, changes in VARIANTS.items():
        folder = train(name, changes, networks, args.out)
        curves[name] = curve(folder)
        more = GUIDANCE if name in ("base", "no dropout") else set()
        found = measure(folder, (judge, gallery), prompts, files, more)
        report["variants"][name] = {"held_loss": curves[name][-1][1], "recognised": found}
        write_text(args.out / "report.json", json.dumps(report, indent=1) + "\n")
        write_text(args.out / "report.md", to_markdown(report))
    plot(curves, "loss on pictures held out, nats per token, against steps", args.out / "curves.png")
    print(to_markdown(report))


if __name__ == "__main__":
    main()
