"""What both stages share: the accelerator, the schedule, logs, checkpoints."""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import shutil
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
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter

from clipgen.config import Config, Stage2Config, TrainConfig, load_config
from clipgen.weights import WeightsError, check_fit


def parse_args(doc: str, **extra: str) -> tuple[argparse.Namespace, Config]:
    """The flags of a training script: --config, --data, --out, then overrides such as stage1.lr=1e-4.

    `extra` adds required paths: name -> help.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="mini", help="mini, coco, imagenet, or the path of a .yaml file")
    parser.add_argument("--data", type=Path, required=True, help="folder of images, searched to any depth")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, curves and pictures")
    for name, text in extra.items():
        parser.add_argument(f"--{name}", type=Path, required=True, help=text)
    parser.add_argument("overrides", nargs="*", help="changes to the configuration, such as stage1.batch_size=16")
    args = parser.parse_args()
    try:
        return args, load_config(args.config, args.overrides)
    except ValueError as error:
        parser.error(str(error))


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Make a user's mistake one clear line and exit code 2, not a traceback."""

    @wraps(main)
    def run() -> None:
        try:
            main()
        except (ValueError, FileNotFoundError) as error:
            ours = type(error).__module__.startswith(("clipgen.", "train."))
            if not (ours or isinstance(error, FileNotFoundError)):
                raise
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error

    return run


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate with the asked precision; bf16 also on CPUs. Seeds torch."""
    torch.manual_seed(config.seed)
    # The schedule counts optimizer steps, however many processes share one.
    return Accelerator(mixed_precision=config.precision, step_scheduler_with_optimizer=False)


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


@dataclass
class Logger:
    """Scalars as CSV, TensorBoard and a line on the terminal; pictures as PNG and TensorBoard.

    Scalars may be tensors: they are read only when a line is due, so that logging never stalls the device.
    """

    out: Path
    steps: int
    batch_size: int
    _board: SummaryWriter = field(init=False, repr=False)
    _start: tuple[float, int] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self._board = SummaryWriter(str(self.out / "tensorboard"))

    def scalars(self, step: int, values: dict[str, float | Tensor]) -> None:
        """Write one row; columns are fixed by the first row of a run."""
        now = time.time()
        if self._start is None:
            self._start = (now, step)
        seconds, done = now - self._start[0], step - self._start[1]
        row = {"step": step, **{k: float(v) for k, v in values.items()}}
        if done:
            row["images_per_second"] = done * self.batch_size / seconds
        for name, value in row.items():
            self._board.add_scalar(name, value, step)
        self._append(row)
        left = f", {(self.steps - step) * seconds / done / 60:.0f} min left" if done else ""
        text = " ".join(f"{k} {v:.4g}" for k, v in row.items() if k != "step")
        print(f"step {step}/{self.steps} {text}{left}", flush=True)

    def _append(self, row: dict[str, float]) -> None:
        path = self.out / "scalars.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["step", "name", "value"])
            writer.writerows((row["step"], name, value) for name, value in row.items() if name != "step")

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """Keep a picture as out/NAME_STEP.png and in TensorBoard."""
        image.save(self.out / f"{name}_{step:06d}.png")
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        self._board.add_image(name, pixels.view(image.height, image.width, 3), step, dataformats="HWC")


def init_weights(model: nn.Module, config: TrainConfig) -> None:
    """Start from `config.init`, if it names weights, in place of random ones.

    Raises:
        WeightsError: they do not fit the model.
        FileNotFoundError: no such file.
    """
    if config.init:
        weights = load_file(config.init)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        try:
            check_fit(expected, weights, type(model).__name__)
        except WeightsError as error:
            raise WeightsError(f"{config.init}: {error}") from error
        model.load_state_dict(weights)


def save_checkpoint(accelerator: Accelerator, out: Path, step: int, config: Config | TrainConfig) -> None:
    """Write everything that resuming needs to out/checkpoint; the previous one stays until the new one is whole."""
    temporary, final, old = out / "checkpoint.tmp", out / "checkpoint", out / "checkpoint.old"
    accelerator.save_state(str(temporary))
    if accelerator.is_main_process:
        (temporary / "state.json").write_text(json.dumps({"step": step, "config": asdict(config)}, indent=1))
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            os.replace(final, old)
        os.replace(temporary, final)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, out: Path) -> int:
    """Restore out/checkpoint into what the accelerator prepared; returns the step to go on from, 0 without one."""
    for name in ("checkpoint", "checkpoint.old"):  # a crash between two renames leaves only the old one
        if (out / name / "state.json").is_file():
            accelerator.load_state(str(out / name))
            return int(json.loads((out / name / "state.json").read_text())["step"])
    return 0


def save_tensors(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write safetensors under a temporary name, then rename."""
    temporary = path.with_name(f"{path.name}.tmp")
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary)
    os.replace(temporary, path)


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
