"""A folder of images -> a folder of weights, in one command that can be interrupted at any time.

    python -m train.all photos --out weights/mine --config mini --clip clip.safetensors --prompts prompts.txt
    clipgen generate "a lemon" --weights weights/mine

Runs check, stage 1, a round trip of the tokens, encode, stage 2, export, index, evaluate and the model card, each the
script of that name, which writes into WORK. Finished steps are skipped and an interrupted one is resumed, so the same
command always brings the training to its end. Sentences about such images (--prompts, at least 20) build the index for
coverage, and are what is evaluated; without them there is no index, and variations of the images are evaluated.
"""

from __future__ import annotations

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

import argparse
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from clipgen.errors import ConfigError, DownloadError
from clipgen.evaluation.features import KINDS
from clipgen.images.sources import open_source
from clipgen.utils.download import PATIENT, RetryPolicy
from clipgen.utils.files import sha256, write_text
from clipgen.utils.text import read_lines
from clipgen.weights.cache import Settings, fetch
from clipgen.weights.catalog import CATALOG
from clipgen.weights.tensor_file import read_header
from train.config import Config, Stage2Config, load_config
from train.index import MIN_SENTENCES
from train.loop.arguments import at_least
from train.loop.batches import check_batch_split
from train.loop.lock import lock_folder
from train.loop.output import check_output
from train.loop.script import command
from train.loop.steps import run_step
from train.losses.embedding import clip_loss_rows

MAX_EVALUATED = 5000
"""Real images to compare with, and without sentences also images to generate."""
WEIGHTS_STEPS = ("export", "index", "evaluate", "card")
"""Steps that write into the folder of weights."""
HASTY = RetryPolicy(timeout=10, attempts=2, backoff=0.5)
"""Retries of a download that has a fallback."""


@dataclass(frozen=True)
class Paths:
    """Inputs and outputs of a training."""

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
        """JSON of the finished steps: name -> minutes they took."""
        return self.work / "minutes.json"

    @property
    def weights(self) -> Path:
        """The folder of weights while it is incomplete."""
        return self.work / "weights"


def plan_steps(paths: Paths, config: Config, features: str, processes: int) -> dict[str, list[str]]:
    """The steps in order: name -> arguments of Python."""
    many = ["-m", "train.loop.launch", "--nproc-per-node", str(processes)] if processes > 1 else []
    images = ["--config", str(paths.config), "--data", paths.data]
    vqgan, gpt, encoded = (str(paths.work / name) for name in ("vqgan", "gpt", "encoded"))
    frozen = ["--vqgan", vqgan, "--clip", str(paths.clip)]
    learned = paths.data if config.stage2.from_pixels else encoded
    prompts = ["--prompts", str(paths.prompts)] if paths.prompts else []
    weights, evaluation = ["--weights", str(paths.weights)], str(paths.work / "evaluation.json")
    size = str(config.model.vqgan.image_size)
    steps = {
        "check": ["-m", "train.check", paths.data, "--out", str(paths.work / "check"), "--size", size],
        "stage 1": [*many, "-m", "train.stage1", *images, "--out", vqgan],
        "round trip": ["-m", "train.roundtrip", *images, "--vqgan", vqgan, "--out", str(paths.work / "roundtrip")],
        "encode": [*many, "-m", "train.encode", *images, *frozen, "--out", encoded],
        "stage 2": [*many, "-m", "train.stage2", *images[:2], "--data", learned, *frozen, "--out", gpt],
        "export": ["-m", "train.export", *images[:2], *frozen, "--gpt", gpt, "--out", str(paths.weights)],
        "index": ["-m", "train.index", *weights, "--encoded", encoded, "--data", paths.data, *prompts],
        "evaluate": [
            *(*many, "-m", "clipgen", "evaluate", *weights, "--reference", paths.data, *prompts),
            *("--features", features, "--limit", str(MAX_EVALUATED), "--out", evaluation),
        ],
        "card": [
            *("-m", "train.card", *weights, "--evaluation", evaluation, *images, *prompts),
            *("--minutes", str(paths.minutes)),
        ],
    }
    left_out = {"encode", "index"} if config.stage2.from_pixels else set[str]()
    left_out |= set() if paths.prompts else {"index"}
    return {name: arguments for name, arguments in steps.items() if name not in left_out}


def check_inputs(paths: Paths, config: Config, processes: int) -> dict[str, Any]:
    """Check inputs and settings up front that would otherwise fail late in the training.

    Returns:
        Inputs and settings of the training, as JSON; with others it cannot be resumed in the same folder.

    Raises:
        ConfigError: a file does not match the configuration.
        WeightsError: the CLIP is missing or is not .safetensors.
        DataError: there are no images, or the sentences cannot be read.
        OutputError: outputs lie inside the data.
    """
    for out in (paths.work, paths.out):
        check_output(paths.data, out)
    source = open_source(paths.data)
    projection = read_header(paths.clip).get("text_projection")
    if projection is None or len(projection.shape) != 2:
        raise ConfigError(f"--clip {paths.clip} holds no CLIP under OpenAI's names: it has no text_projection matrix")
    width = projection.shape[1]
    if width != config.model.gpt.n_cond:
        raise ConfigError(
            f"--clip {paths.clip} has embeddings of {width} numbers, model.gpt.n_cond is {config.model.gpt.n_cond}; "
            f"add model.gpt.n_cond={width}, or give the CLIP that belongs to the configuration"
        )
    check_batches(config, processes)
    if paths.prompts:
        lines = [line for line in read_lines(paths.prompts) if line]
        if len(lines) < MIN_SENTENCES:
            raise ConfigError(
                f"--prompts {paths.prompts} has {len(lines)} sentences; give at least {MIN_SENTENCES}, one a line"
            )
    return {
        "images": source.fingerprint(),
        "clip": sha256(paths.clip),
        "prompts": sha256(paths.prompts) if paths.prompts else None,
        **_flatten(asdict(config)),
    }


def check_batches(config: Config, processes: int) -> None:
    """Check that the batches of both stages split among processes and micro-batches.

    Raises:
        ConfigError: they do not; the message names the setting.
    """
    for name, stage in (("stage1", config.stage1), ("stage2", config.stage2)):
        try:
            check_batch_split(stage, processes)
            if isinstance(stage, Stage2Config) and stage.clip_weight:
                clip_loss_rows(stage, processes)
        except ConfigError as error:
            raise ConfigError(f"{name}.{error}") from error


def choose_features(asked: str | None, before: str | None) -> str:
    """Features to evaluate with: as requested, as in the interrupted training, or the best available.

    Raises:
        ConfigError: Inception is requested and cannot be downloaded.
    """
    features = asked or before or "inception"
    if features == "inception":
        try:
            fetch(CATALOG["inception"], Settings.from_environment(), PATIENT if asked else HASTY, log=print)
        except DownloadError as error:
            if asked:
                raise ConfigError(f"{error}. Or give --features clip or efficientnet") from error
            features = "efficientnet" if find_spec("efficientnet_lite_pytorch") else "clip"
            print(f"evaluation will use {features} features: {error}", flush=True)
    return features


def begin(paths: Paths, config: Config, made_from: dict[str, Any]) -> None:
    """Claim the work folder for this training, or check that it belongs to it.

    Raises:
        ConfigError: it belongs to another training, or the output folder exists.
    """
    settings = paths.work / "settings.json"
    if settings.is_file():
        before = json.loads(settings.read_text())
        other = [f"{k} ({before[k]}, not {v})" for k, v in made_from.items() if before.get(k, v) != v]
        if other:
            raise ConfigError(f"{paths.work} was begun with another {', '.join(other)}; give another --work")
    elif paths.out.exists():
        raise ConfigError(f"{paths.out} exists; give another --out, or move it away")
    else:
        paths.work.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.structured(config), paths.config)
        write_text(settings, json.dumps(made_from, indent=1) + "\n")


def publish(weights: Path, out: Path) -> None:
    """Move the complete folder of weights to its final path atomically."""
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(weights, out)
    except OSError:  # on another disk
        temporary = out.with_name(f".{out.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(weights, temporary)
        os.replace(temporary, out)
        shutil.rmtree(weights)


def _flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Nested settings as a flat mapping such as "model.vqgan.ch" -> 128."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, inner in value.items() for k, v in _flatten(inner, f"{name}.{key}" if name else key).items()}


def parse() -> tuple[Paths, Config, str | None, int]:
    """Parse the command line: paths, configuration, --features and --processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help='images: a folder, a .txt list or .tar shards such as "data/{000..127}.tar"')
    parser.add_argument("--out", type=Path, required=True, help="folder of weights to write")
    parser.add_argument("--config", default="mini", help="mini, photos, coco, imagenet, or the path of a .yaml file")
    parser.add_argument("--clip", type=Path, required=True, help="CLIP weights, .safetensors under OpenAI's names")
    parser.add_argument("--prompts", type=Path, help="sentences about such images, one per line, at least 20")
    help_features = "features for the final evaluation [default: inception, or what is available offline]"
    parser.add_argument("--features", choices=KINDS, help=help_features)
    parser.add_argument("--processes", type=at_least(1), default=1, help="processes of this machine, such as its GPUs")
    parser.add_argument("--work", type=Path, help="folder for intermediate results [default: runs/NAME_OF_OUT]")
    parser.add_argument("overrides", nargs="*", help="changes to the configuration, such as stage1.steps=1000")
    args = parser.parse_intermixed_args()
    paths = Paths(args.data, args.clip, args.prompts, args.work or Path("runs") / args.out.name, args.out)
    return paths, load_config(args.config, args.overrides), args.features, args.processes


@command
def main() -> None:
    paths, config, asked, processes = parse()
    made_from = check_inputs(paths, config, processes)
    with lock_folder(paths.work):
        chosen = paths.work / "features.txt"
        features = choose_features(asked, chosen.read_text() if chosen.is_file() else None)
        begin(paths, config, made_from)
        write_text(chosen, features)
        minutes = json.loads(paths.minutes.read_text()) if paths.minutes.is_file() else {}
        if not paths.weights.exists() and not paths.out.exists():  # never exported, or deleted since
            minutes = {name: spent for name, spent in minutes.items() if name not in WEIGHTS_STEPS}
        for name, arguments in plan_steps(paths, config, features, processes).items():
            if name in minutes:
                continue
            print(f"== {name}", flush=True)
            started = time.monotonic()
            run_step(name, arguments)
            minutes[name] = round((time.monotonic() - started) / 60, 2)
            write_text(paths.minutes, json.dumps(minutes, indent=1) + "\n")
        if paths.weights.exists():
            publish(paths.weights, paths.out)
    print(f"{paths.out} is complete; clipgen generate 'a lemon' --weights {paths.out}")


if __name__ == "__main__":
    main()
