"""The whole mini model from its data, a part after the other, on whatever machine there is.

    python -m train.mini.recipe --data data/emoji --work runs/mini --out weights/mine [--minutes 60]
    python -m train.mini.recipe --only gpt --minutes 9 ...

Parts: image (CLIP's image tower), text (its text tower), vqgan, plain (the GPT on plain scenes), gpt (on all), export,
index. Each is a script; those that train go on where they stopped, and --minutes is the budget of each. After a part
its weights are in WORK/weights in half precision, small enough to carry: on another machine --start DIR begins with
these, or with a folder of weights such as weights/mini.
"""

from __future__ import annotations

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

import argparse
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from clipgen.utils.cpu import thread_count, usable_cores
from clipgen.weights.precision import pick_device
from train.config import load_config
from train.loop.batches import choose_precision
from train.loop.checkpoint import in_half, save_tensors
from train.loop.script import command, minutes
from train.loop.steps import run_step
from train.mini.text_tower import save_clip, split_clip

PARTS = ("image", "text", "vqgan", "plain", "gpt", "export", "index")
ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "clipgen" / "configs" / "mini.yaml"
SHIPPED = ROOT / "weights" / "mini"
"""Its image tower knows the objects already: a new one starts from it."""
SHIPPED_HEADS = Path(__file__).with_name("heads.safetensors")
"""Heads of the shipped image tower, which only training needs."""
PLAIN_STEPS = 4000
"""Of plain scenes, where nothing else is said."""
_WEIGHTS = {
    "image": ("clip/image.safetensors", "clip/heads.safetensors"),
    "text": ("clip/text.safetensors",),
    "vqgan": ("vqgan/vqgan.safetensors",),
    "plain": ("plain/gpt.safetensors",),
    "gpt": ("gpt/gpt.safetensors",),
}
"""What is carried of each part, in WORK."""
_OF_SCENES = {
    # Everything lies on the grid, which crops would move. Half of the tokens are a plain ground: few codes are worth
    # many there, so a low perplexity is no reason to stop.
    "vqgan": ("stage1.min_scale=1.0", "stage1.perceptual=none", "stage1.patience=0"),
    "plain": ("stage2.from_pixels=true",),
    "gpt": ("stage2.from_pixels=true",),
}
"""Settings for scenes, of which no two are the same."""
_ON_GPU = {
    "image": ("batch_size=512", "lr=0.004", "steps=4000"),
    "text": ("batch_size=1024", "steps=4000"),
    "vqgan": ("stage1.batch_size=64", "stage1.lr=0.002", "stage1.steps=6000"),
    "plain": ("stage2.batch_size=256", "stage2.steps=1000"),
    "gpt": ("stage2.batch_size=256", "stage2.steps=6000"),
}
"""Larger steps, where they cost no more."""


@dataclass(frozen=True)
class Machine:
    """Training resources of a machine.

    Attributes:
        workers: processes that compose scenes; 0 where there is no core to spare.
        has_gpu: whether there is one.
        processes: that share a step of the VQGAN or the GPT.
    """

    workers: int
    has_gpu: bool
    processes: int = 1

    @classmethod
    def here(cls) -> Machine:
        """Detect the resources of this machine."""
        cores = thread_count(usable_cores())
        if pick_device(None).type == "cuda":
            return cls(max(0, cores - 2), True)
        return cls(0, False, min(8, 1 << cores.bit_length() - 1))  # a power of two divides the batches


def part_command(part: str, args: argparse.Namespace, machine: Machine) -> list[str]:
    """Arguments of Python that run a part."""
    work, data = args.work, args.data
    section = {"vqgan": "stage1.", "plain": "stage2.", "gpt": "stage2."}.get(part, "")
    settings = [f"{section}workers={machine.workers}", *_OF_SCENES.get(part, ())]
    settings += _ON_GPU.get(part, ()) if machine.has_gpu else ()
    folder = {"image": "clip/image", "text": "clip/text"}.get(part, part)
    start = work / _WEIGHTS[part][0] if args.start and part in _WEIGHTS else None  # where `unpack` has put it
    if part == "image" and (start is None or not start.is_file()):
        start = SHIPPED / "clip.safetensors"
    if part == "gpt" and (plain := work / "plain" / "gpt.safetensors").is_file():
        start = plain
    if start is not None and start.is_file() and not (work / folder / "checkpoints").is_dir():
        settings.append(f"{section}init={start}")
    settings += [text.removeprefix(f"{part}.") for text in args.overrides if _belongs(text, part)]
    budget = ["--minutes", f"{args.minutes:g}"] if args.minutes else []
    tower = ["--data", data, "--out", str(work / "clip"), "--wordnet", str(args.wordnet), *budget, *settings]
    scenes = f"train.mini.source:{{}}={data}"
    stage = ["--config", str(args.config), *budget, "--out", str(work / part)]
    clip = str(work / "clip" / "clip.safetensors")
    frozen = "--vqgan", str(work / "vqgan"), "--clip", clip
    launch = ["-m", "train.loop.launch", "--nproc-per-node", str(machine.processes)]
    stage1, stage2 = ([*(launch if machine.processes > 1 else ()), f"train/stage{n}.py", *stage] for n in (1, 2))
    commands = {
        "image": ["-m", "train.mini.image_tower", *tower],
        "text": ["-m", "train.mini.text_tower", *tower],
        "vqgan": [*stage1, "--data", scenes.format("all_scenes"), *settings],
        "plain": [
            *(*stage2, "--data", scenes.format("plain_scenes"), "--seen", scenes.format("seen_plain_scenes")),
            *(*frozen, f"stage2.steps={PLAIN_STEPS}", *settings),
        ],
        "gpt": [
            *(*stage2, "--data", scenes.format("trained_scenes"), "--seen", scenes.format("seen_scenes")),
            *(*frozen, *settings),
        ],
        "export": [
            *("-m", "train.export", "--config", str(args.config), "--clip", clip),
            *("--vqgan", str(work / "vqgan"), "--gpt", str(work / "gpt"), "--out", str(args.out)),
        ],
        "index": [
            *("-m", "train.mini.scene_index", "--weights", str(args.out), "--data", data),
            *("--wordnet", str(args.wordnet)),
            *(f"--{text.removeprefix('index.')}" for text in args.overrides if _belongs(text, "index")),
        ],
    }
    return commands[part]


def _belongs(override: str, part: str) -> bool:
    """Whether a setting such as image.steps=5 or stage1.steps=5 is for a part."""
    first = override.split(".", 1)[0]
    return part in {"stage1": ("vqgan",), "stage2": ("plain", "gpt")}.get(first, (first,))


def unpack(start: Path, work: Path) -> None:
    """Put weights where WORK has none, so that a part can go on from them and stand on those before it.

    Args:
        start: a WORK/weights, or a folder of weights.
        work: the folder of this training.
    """
    (work / "clip").mkdir(parents=True, exist_ok=True)
    if (start / "clip.safetensors").is_file():
        towers = split_clip(load_file(start / "clip.safetensors"))
        for name, tensors in towers.items():
            if not (own := work / "clip" / f"{name}.safetensors").exists():
                save_tensors(tensors, own)
    if start.resolve() == SHIPPED and not (heads := work / "clip" / "heads.safetensors").exists():
        shutil.copy(SHIPPED_HEADS, heads)
    for name in (name for names in _WEIGHTS.values() for name in names):
        carried, own = start / Path(name).name, work / name
        if carried.is_file() and not own.exists():
            own.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(carried, own)
    clip = work / "clip"
    has_towers = all((clip / f"{name}.safetensors").is_file() for name in ("image", "text"))
    if has_towers and not (clip / "clip.safetensors").exists():
        save_clip(load_file(clip / "text.safetensors"), clip)


def carry(part: str, work: Path) -> None:
    """Write a part's weights to WORK/weights in half precision."""
    (work / "weights").mkdir(parents=True, exist_ok=True)
    for name in _WEIGHTS.get(part, ()):
        save_tensors(in_half(load_file(work / name)), work / "weights" / Path(name).name)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/emoji", help="the folder that `make renders` fills")
    parser.add_argument("--work", type=Path, default=Path("runs/mini"), help="folder of checkpoints and curves")
    parser.add_argument("--out", type=Path, default=Path("weights/mine"), help="folder of weights to write")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="WordNet's database")
    parser.add_argument("--config", type=Path, default=CONFIG, help="sizes and settings, a .yaml file")
    parser.add_argument("--only", choices=PARTS, action="append", help="this part alone; may be given several times")
    parser.add_argument("--start", type=Path, help="weights to begin with, such as weights/mini")
    parser.add_argument("--minutes", type=minutes, help="budget of each part")
    parser.add_argument("overrides", nargs="*", help="such as stage2.steps=500, image.batch_size=32")
    args = parser.parse_intermixed_args()
    args.data, machine = str(Path(args.data).resolve()), Machine.here()
    for name in ("work", "out", "wordnet", "start", "config"):
        if (path := getattr(args, name)) is not None:
            setattr(args, name, path.resolve())
    if args.start:
        unpack(args.start, args.work)
    parts = args.only or PARTS
    if "gpt" in parts:  # what it cannot train in is refused before hours of other parts
        choose_precision(load_config(args.config, [text for text in args.overrides if _belongs(text, "gpt")]).stage2)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    for part in parts:
        arguments = part_command(part, args, machine)
        print(f"== {part}: {' '.join(arguments)}", flush=True)
        run_step(part, arguments, ROOT, {**os.environ, "PYTHONPATH": path})
        carry(part, args.work)


if __name__ == "__main__":
    main()
