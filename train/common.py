"""What both stages share: the accelerator, the schedule, logs, checkpoints."""

from __future__ import annotations

import argparse
import csv
import errno
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter

from clipgen.config import Config, ConfigError, Stage2Config, TrainConfig, load_config
from clipgen.weights import WeightsError, check_fit
from train.checkpoint import Checkpoints
from train.checkpoint import save_tensors as save_tensors


def parse_args(doc: str, data: str = "pictures", **extra: str) -> tuple[argparse.Namespace, Config]:
    """The flags of a training script: --config, --data, --out, then overrides such as stage1.lr=1e-4.

    `extra` adds required paths: name -> help.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="mini", help="mini, coco, imagenet, or the path of a .yaml file")
    kinds = 'folder, .txt list of paths, or .tar shards such as "data/{000000..000127}.tar", also http(s)://'
    parser.add_argument("--data", required=True, help=f"{data}: {kinds}")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, curves and pictures")
    for name, text in extra.items():
        parser.add_argument(f"--{name}", type=Path, required=True, help=text)
    parser.add_argument("overrides", nargs="*", help="changes to the configuration, such as stage1.batch_size=16")
    args = parser.parse_intermixed_args()  # overrides may stand anywhere
    try:
        return args, load_config(args.config, args.overrides)
    except ValueError as error:
        parser.error(str(error))


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Make a user's mistake or a full disk one clear line and exit code 2, Ctrl-C one line and 130; no traceback."""

    @wraps(main)
    def run() -> None:
        try:
            main()
        except KeyboardInterrupt as error:
            print("stopped; the same command goes on from what is saved", file=sys.stderr)
            raise SystemExit(130) from error
        except (ValueError, OSError) as error:
            ours = type(error).__module__.startswith(("clipgen.", "train."))
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            if not (ours or full or isinstance(error, FileNotFoundError)):
                raise
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error

    return run


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate with the asked precision, over as many processes as `torchrun` started. Seeds torch.

    Raises:
        ConfigError: the processes cannot have equal parts of a batch.
    """
    # Without being told, Accelerate looks for other processes on accelerators only.
    accelerator = Accelerator(mixed_precision=config.precision, cpu=not torch.accelerator.is_available())
    if config.batch_size % accelerator.num_processes:
        raise ConfigError(
            f"batch_size is {config.batch_size}, for all processes together; "
            f"it must be a multiple of their number, {accelerator.num_processes}"
        )
    torch.manual_seed(config.seed)  # the same weights everywhere
    return accelerator


def seeded(config: TrainConfig, step: int) -> torch.Generator:
    """The random numbers of one step, of all processes: they draw for the whole batch and use their part."""
    return torch.Generator().manual_seed(config.seed * 1_000_003 + step)


def own_part(accelerator: Accelerator, batch_size: int) -> slice:
    """Which rows of a batch are this process's."""
    size = batch_size // accelerator.num_processes
    return slice(accelerator.process_index * size, (accelerator.process_index + 1) * size)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next step. It follows from the step and the configuration; nothing of it is saved."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def cosine(config: TrainConfig) -> Callable[[int], float]:
    """Learning-rate factor by step: linear warm-up, then a cosine down to 2 %."""

    def factor(step: int) -> float:
        if step < config.warmup:
            return (step + 1) / config.warmup
        progress = (step - config.warmup) / max(1, config.steps - config.warmup)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor


def build_ema(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of a model's weights."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)).eval().requires_grad_(False)


class TrainingError(ValueError):
    """A training that makes no sense to go on with; the message says since when and what to try."""


@dataclass
class Logger:
    """Scalars as CSV, TensorBoard and a line on the terminal; pictures as PNG and TensorBoard.

    Scalars may be tensors: they are read only when a line is due, so that logging never stalls the device.

    Attributes:
        start: the step that training goes on from; what a run before it logged of later ones is dropped.
    """

    out: Path
    steps: int
    batch_size: int
    start: int = 0
    _board: SummaryWriter = field(init=False, repr=False)
    _since: tuple[float, int] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self._board = SummaryWriter(str(self.out / "tensorboard"), purge_step=self.start + 1 if self.start else None)
        path = self.out / "scalars.csv"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if not line[0].isdigit() or int(line.split(",")[0]) <= self.start]
        if len(kept) < len(lines):
            write_text(path, "".join(kept))

    def scalars(self, step: int, values: dict[str, float | Tensor]) -> None:
        """Write one row.

        Raises:
            TrainingError: a value is not finite.
        """
        now = time.time()
        if self._since is None:
            self._since = (now, step)
        seconds, done = now - self._since[0], step - self._since[1]
        row = {"step": step, **{k: float(v) for k, v in values.items()}}
        if done:
            row["images_per_second"] = done * self.batch_size / seconds
        for name, value in row.items():
            self._board.add_scalar(name, value, step)
        self._append(row)
        left = f", {(self.steps - step) * seconds / done / 60:.0f} min left" if done else ""
        text = " ".join(f"{k} {v:.4g}" for k, v in row.items() if k != "step")
        print(f"step {step}/{self.steps} {text}{left}", flush=True)
        check_finite(step, values)

    def _append(self, row: dict[str, float]) -> None:
        path = self.out / "scalars.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(["step", "name", "value"])
            writer.writerows((row["step"], name, value) for name, value in row.items() if name != "step")

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """Keep a picture as out/NAME_STEP.png and in TensorBoard."""
        image.save(self.out / f"{name}_{step:06d}.png")
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        self._board.add_image(name, pixels.view(image.height, image.width, 3), step, dataformats="HWC")


def check_finite(step: int, values: Mapping[str, float | Tensor]) -> None:
    """Stop a training whose numbers have become NaN or infinite, before it is saved over a good checkpoint.

    Raises:
        TrainingError: one of the values is not finite.
    """
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise TrainingError(
            f"step {step}: {', '.join(bad)} not finite, so the weights are lost; the last checkpoint is from before. "
            "Go on from it with a lower lr, a lower grad_clip, or precision=no"
        )


def report_failures(accelerator: Accelerator, out: Path, failures: Mapping[str, str]) -> None:
    """Count the pictures that could not be read, and add them to OUT/skipped.txt. All processes call this."""
    found = {f"{name}: {why}" for part in gather_object([dict(failures)]) for name, why in part.items()}
    if found and accelerator.is_main_process:
        path = out / "skipped.txt"
        lines = sorted(found | set(path.read_text(encoding="utf-8").splitlines() if path.exists() else ()))
        write_text(path, "".join(f"{line}\n" for line in lines))
        print(f"{len(lines)} pictures could not be read, all in {path}; {lines[0]}", flush=True)


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Read a .safetensors file into a model.

    Raises:
        WeightsError: it does not fit the model.
        FileNotFoundError: no such file.
    """
    weights = load_file(path)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    try:
        check_fit(expected, weights, type(model).__name__)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    model.load_state_dict(weights)


def init_weights(model: nn.Module, config: TrainConfig) -> None:
    """Start from `config.init`, if it names weights, in place of random ones; raises as `load_weights` does."""
    if config.init:
        load_weights(model, config.init)


def save_checkpoint(accelerator: Accelerator, out: Path, step: int, config: TrainConfig) -> None:
    """Write a checkpoint of a training without settings to compare (`train.checkpoint.Checkpoints`)."""
    Checkpoints(accelerator, out, config.keep, about=asdict(config)).save(step)


def load_checkpoint(accelerator: Accelerator, out: Path) -> int:
    """Restore the newest checkpoint in OUT; returns the step to go on from, 0 without one."""
    return Checkpoints(accelerator, out).load()


def build_optimizers(model: nn.Module, config: Stage2Config) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the matrices of the blocks and AdamW for the rest (Jordan et al. 2024).

    Muon's steps are scaled to AdamW's (Liu et al., arXiv 2502.16982), so one learning rate serves both.
    """
    groups = decayed(model, config.weight_decay)
    if config.optimizer == "adamw":
        return [torch.optim.AdamW(groups, config.lr, betas=(0.9, 0.95), fused=True)]
    matrices = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    ours = set(map(id, matrices))
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in ours]
    muon = torch.optim.Muon(matrices, config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(groups, config.lr, betas=(0.9, 0.95), fused=True)]


def decayed(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay; embeddings, positions, gains and biases do not."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (others if parameter.ndim < 2 or "emb" in name else matrices).append(parameter)
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
