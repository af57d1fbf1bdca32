"""A folder of pictures -> a folder of weights, in one command that may be stopped anywhere.

    python -m train.all photos --out weights/mine --config mini --clip clip.safetensors --prompts prompts.txt
    clipgen generate "a lemon" --weights weights/mine

Runs check, stage 1, a round trip of the tokens, encode, stage 2, export, index, evaluate and the model's card, each the
script of that name; what each writes is in WORK. A step that is done is not done again, and one that was stopped goes
on, so the same command always brings it to its end. Sentences about such pictures (--prompts, at least 20) give the
index that prompts are understood by, and something to evaluate; without them it is done by the pictures alone.
"""

from __future__ import annotations

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from clipgen.errors import ConfigError, DownloadError
from clipgen.evaluation.features import KINDS, fetched
from clipgen.images.sources import open_source
from clipgen.utils.arguments import at_least
from clipgen.utils.files import sha256, write_text
from clipgen.weights.tensor_file import read_header
from train.config import Config, load_config
from train.loop.script import command

MOST = 5000
"""Real pictures to evaluate against, and without sentences also pictures to draw."""
ON_WEIGHTS = ("export", "index", "evaluate", "card")
"""Steps that make the folder of weights and what is in it."""
SENTENCES = 20
"""Fewest that the index can be made with."""


@dataclass(frozen=True)
class Paths:
    """What is read and written."""

    data: str
    clip: Path
    prompts: Path | None
    work: Path
    out: Path

    @property
    def config(self) -> Path:
        return self.work / "config.yaml"

    @property
    def minutes(self) -> Path:
        """Of the steps that are done: their names and how long they took."""
        return self.work / "minutes.json"

    @property
    def weights(self) -> Path:
        """The folder of weights, until it is complete."""
        return self.work / "weights"


def steps(paths: Paths, config: Config, features: str, processes: int) -> dict[str, list[str]]:
    """What there is to do: name -> arguments of Python."""
    many = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    pictures = ["--config", str(paths.config), "--data", paths.data]
    vqgan, gpt, encoded = (str(paths.work / name) for name in ("vqgan", "gpt", "encoded"))
    frozen = ["--vqgan", vqgan, "--clip", str(paths.clip)]
    learned = paths.data if config.stage2.from_pixels else encoded
    prompts = ["--prompts", str(paths.prompts)] if paths.prompts else []
    weights, evaluation = ["--weights", str(paths.weights)], str(paths.work / "evaluation.json")
    size = str(config.model.vqgan.image_size)
    found = {
        "check": ["-m", "train.check", paths.data, "--out", str(paths.work / "check"), "--size", size],
        "stage 1": [*many, "-m", "train.stage1", *pictures, "--out", vqgan],
        "round trip": ["-m", "train.roundtrip", *pictures, "--vqgan", vqgan, "--out", str(paths.work / "roundtrip")],
        "encode": [*many, "-m", "train.encode", *pictures, *frozen, "--out", encoded],
        "stage 2": [*many, "-m", "train.stage2", *pictures[:2], "--data", learned, *frozen, "--out", gpt],
        "export": ["-m", "train.export", *pictures[:2], *frozen, "--gpt", gpt, "--out", str(paths.weights)],
        "index": ["-m", "train.mini.index", *weights, "--encoded", encoded, "--data", paths.data, *prompts],
        "evaluate": [
            *(*many, "-m", "clipgen", "evaluate", *weights, "--reference", paths.data, *prompts),
            *("--features", features, "--limit", str(MOST), "--out", evaluation),
        ],
        "card": [
            *("-m", "train.card", *weights, "--evaluation", evaluation, *pictures, *prompts),
            *("--minutes", str(paths.minutes)),
        ],
    }
    left_out = {"encode", "index"} if config.stage2.from_pixels else set[str]()
    left_out |= set() if paths.prompts else {"index"}
    return {name: arguments for name, arguments in found.items() if name not in left_out}


def check_inputs(paths: Paths, config: Config, features: str, processes: int) -> dict[str, Any]:
    """Find out in a minute what would end the training after days.

    Returns:
        What the training is made from, as JSON: another one does not go on in the same folder.

    Raises:
        ConfigError: a file does not fit.
        WeightsError: the CLIP is missing or is not .safetensors.
        DataError: no pictures.
    """
    names = open_source(paths.data).names
    projection = read_header(paths.clip).get("text_projection")
    if projection is None or len(projection.shape) != 2:
        raise ConfigError(f"--clip {paths.clip} holds no CLIP under OpenAI's names: it has no text_projection matrix")
    width = projection.shape[1]
    if width != config.model.gpt.n_cond:
        raise ConfigError(
            f"--clip {paths.clip} has embeddings of {width} numbers, model.gpt.n_cond is {config.model.gpt.n_cond}; "
            f"add model.gpt.n_cond={width}, or give the CLIP that belongs to the configuration"
        )
    for name, size in (("stage1", config.stage1.batch_size), ("stage2", config.stage2.batch_size)):
        if size % processes:
            raise ConfigError(f"{name}.batch_size is {size}; it must be a multiple of --processes, {processes}")
    if paths.prompts:
        try:
            lines = [line for line in paths.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompts {paths.prompts} cannot be read: {error}") from error
        if len(lines) < SENTENCES:
            raise ConfigError(
                f"--prompts {paths.prompts} has {len(lines)} sentences; give at least {SENTENCES}, one a line"
            )
    if features == "inception":
        try:
            fetched("inception", print)
        except DownloadError as error:
            raise ConfigError(f"{error}. Or give --features clip or efficientnet") from error
    return {
        "pictures": hashlib.sha256("\n".join(names).encode()).hexdigest(),
        "clip": sha256(paths.clip),
        "prompts": sha256(paths.prompts) if paths.prompts else None,
        "features": features,
        **_flat(asdict(config)),
    }


def begin(paths: Paths, config: Config, made_from: dict[str, Any]) -> None:
    """Make the folder of work this training's own, or see that it is.

    Raises:
        ConfigError: it belongs to another one, or the place for the weights is taken.
    """
    settings = paths.work / "settings.json"
    if settings.is_file():
        before = json.loads(settings.read_text())
        other = [f"{k} ({before.get(k)}, not {v})" for k, v in made_from.items() if before.get(k) != v]
        if other:
            raise ConfigError(f"{paths.work} was begun with another {', '.join(other)}; give another --work")
    elif paths.out.exists():
        raise ConfigError(f"{paths.out} exists; give another --out, or move it away")
    else:
        paths.work.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.structured(config), paths.config)
        write_text(settings, json.dumps(made_from, indent=1) + "\n")


@contextmanager
def sole(work: Path) -> Iterator[int]:
    """Wait until no other process works in a folder; yields a descriptor that holds it as long as any process has it.

    A killed command may leave its script behind, at work: with the descriptor, that one holds the folder too.
    """
    work.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(work / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process is at work in {work}; waiting for it", flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def run(name: str, arguments: Sequence[str], lock: int) -> None:
    """Run one script to its end; SIGTERM is passed on, Ctrl-C reaches it by itself.

    Raises:
        SystemExit: it failed or was stopped, with its exit code.
    """
    process = subprocess.Popen([sys.executable, *arguments], pass_fds=[lock])
    handlers = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
    }
    try:
        code = process.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if code:
        print(f"{name} ended with exit code {code}; the same command goes on from there", file=sys.stderr)
        raise SystemExit(code if code > 0 else 128 - code)


def publish(weights: Path, out: Path) -> None:
    """Give a complete folder its place; it is there as a whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(weights, out)
    except OSError:  # on another disk
        temporary = out.with_name(f".{out.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(weights, temporary)
        os.replace(temporary, out)
        shutil.rmtree(weights)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested settings as "model.vqgan.ch" -> 128."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{name}.{key}" if name else key).items()}


def parse() -> tuple[Paths, Config, str, int]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help='pictures: a folder, a .txt list or .tar shards such as "data/{000..127}.tar"')
    parser.add_argument("--out", type=Path, required=True, help="folder of weights to write")
    parser.add_argument("--config", default="mini", help="mini, coco, imagenet, or the path of a .yaml file")
    parser.add_argument("--clip", type=Path, required=True, help="CLIP weights, .safetensors under OpenAI's names")
    parser.add_argument("--prompts", type=Path, help="sentences about such pictures, one a line, at least 20")
    parser.add_argument("--features", choices=KINDS, default=KINDS[0], help="what pictures are compared by at the end")
    parser.add_argument("--processes", type=at_least(1), default=1, help="processes of this machine, such as its GPUs")
    parser.add_argument("--work", type=Path, help="folder for everything on the way [default: runs/NAME_OF_OUT]")
    parser.add_argument("overrides", nargs="*", help="changes to the configuration, such as stage1.steps=1000")
    args = parser.parse_intermixed_args()
    if args.processes < 1:
        parser.error(f"--processes is {args.processes}; it must be at least 1")
    paths = Paths(args.data, args.clip, args.prompts, args.work or Path("runs") / args.out.name, args.out)
    try:
        return paths, load_config(args.config, args.overrides), args.features, args.processes
    except ValueError as error:
        parser.error(str(error))


@command
def main() -> None:
    paths, config, features, processes = parse()
    made_from = check_inputs(paths, config, features, processes)
    with sole(paths.work) as lock:
        begin(paths, config, made_from)
        minutes = json.loads(paths.minutes.read_text()) if paths.minutes.is_file() else {}
        if not paths.weights.exists() and not paths.out.exists():  # never exported, or deleted since
            minutes = {name: spent for name, spent in minutes.items() if name not in ON_WEIGHTS}
        for name, arguments in steps(paths, config, features, processes).items():
            if name in minutes:
                continue
            print(f"== {name}", flush=True)
            started = time.monotonic()
            run(name, arguments, lock)
            minutes[name] = round((time.monotonic() - started) / 60, 2)
            write_text(paths.minutes, json.dumps(minutes, indent=1) + "\n")
        if paths.weights.exists():
            publish(paths.weights, paths.out)
    print(f"{paths.out} is complete; clipgen generate 'a lemon' --weights {paths.out}")


if __name__ == "__main__":
    main()
