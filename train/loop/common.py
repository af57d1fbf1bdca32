"""What the training scripts share: flags, the accelerator, parts of batches, schedules, optimizers, averages."""

from __future__ import annotations

import argparse
import errno
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from clipgen.errors import ClipGenError, ConfigError, WeightsError
from clipgen.utils.files import write_text
from clipgen.weights.model_dir import check_shapes
from train.config import Config, Stage2Config, TrainConfig, load_config
from train.loop.checkpoint import Checkpoints
from train.loop.checkpoint import save_tensors as save_tensors
from train.loop.logger import TRACKERS, check_tracker


def parse_args(
    doc: str,
    paths: Mapping[str, str] | None = None,
    optional: Mapping[str, str] | None = None,
    tracked: bool = False,
) -> tuple[argparse.Namespace, Config]:
    """The flags of a training script: --config, --data, --out, then overrides such as stage1.lr=1e-4.

    Args:
        doc: what the script does.
        paths: more required paths, name -> help.
        optional: more flags that can be left out, name -> help.
        tracked: whether it has curves, so that --tracker says where they go.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="mini", help="mini, photos, coco, imagenet, or the path of a .yaml file")
    kinds = 'folder, .txt list of paths, or .tar shards such as "data/{000000..000127}.tar", also http(s)://'
    parser.add_argument("--data", required=True, help=f"pictures: {kinds}")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, curves and pictures")
    for name, text in (paths or {}).items():
        parser.add_argument(f"--{name}", type=Path, required=True, help=text)
    for name, text in (optional or {}).items():
        parser.add_argument(f"--{name}", help=text)
    if tracked:
        parser.add_argument("--tracker", choices=TRACKERS, default=TRACKERS[0], help="where curves are shown")
    parser.add_argument("overrides", nargs="*", help="changes to the configuration, such as stage1.batch_size=16")
    args = parser.parse_intermixed_args()  # overrides may stand anywhere
    try:
        if tracked:
            check_tracker(args.tracker)
        return args, load_config(args.config, args.overrides)
    except ValueError as error:
        parser.error(str(error))


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Make a user's mistake or a full disk one clear line and exit code 2, Ctrl-C one line and 130; no traceback.

    Processes that end together, done or stopped (`train.loop.stopping.Stop.leave`), leave their group first.
    """

    @wraps(main)
    def run() -> None:
        stopped: SystemExit | None = None
        try:
            main()
        except SystemExit as error:
            stopped = SystemExit(error.code)  # another: the first one's traceback holds DDP (see leave_group)
        except KeyboardInterrupt as error:
            print("stopped; the same command goes on from what is saved", file=sys.stderr)
            raise SystemExit(130) from error
        except (ValueError, OSError) as error:
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            if not (isinstance(error, ClipGenError) or full or isinstance(error, FileNotFoundError)):
                raise
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error
        leave_group()
        if stopped:
            raise stopped

    return run


def leave_group() -> None:
    """End the threads that talk to the other processes of a training; without any nothing happens.

    A thread of gloo that lets go of a tensor while Python ends aborts the process, which had done all it should. DDP
    must be gone by now: if it is the last to hold the group, its end waits for threads that wait for the GIL.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate with the asked precision, over as many processes as `torchrun` started. Seeds torch.

    Raises:
        ConfigError: the processes cannot have equal parts of a batch, or half precision is asked for on a CPU.
    """
    on_cpu = not torch.accelerator.is_available()
    if on_cpu and config.precision == "fp16":
        raise ConfigError("precision=fp16 needs a GPU, and there is none; use bf16 or no")
    # Without being told, Accelerate looks for other processes on accelerators only.
    accelerator = Accelerator(mixed_precision=config.precision, cpu=on_cpu)
    check_parts(config, accelerator.num_processes)
    torch.manual_seed(config.seed)  # the same weights everywhere
    return accelerator


def check_parts(config: TrainConfig, processes: int) -> None:
    """Whether a batch can be cut into equal parts.

    Raises:
        ConfigError: it cannot.
    """
    if config.batch_size % processes:
        raise ConfigError(
            f"batch_size is {config.batch_size}, for all processes together; "
            f"it must be a multiple of their number, {processes}"
        )
    if config.batch_size % (processes * config.accumulate):
        raise ConfigError(
            f"accumulate is {config.accumulate}; it must divide the {config.batch_size // processes} pictures that "
            f"each process has of a batch of {config.batch_size}"
        )


def seeded(config: TrainConfig, step: int) -> torch.Generator:
    """The random numbers of one step, of all processes: they draw for the whole batch and use their part."""
    return torch.Generator().manual_seed(config.seed * 1_000_003 + step)


def own_part(accelerator: Accelerator, batch_size: int) -> slice:
    """Which rows of a batch are this process's."""
    size = batch_size // accelerator.num_processes
    return slice(accelerator.process_index * size, (accelerator.process_index + 1) * size)


def in_parts(accelerator: Accelerator, model: nn.Module, parts: Sequence[Any]) -> Iterator[Any]:
    """The parts of a batch; gradients of all of them are exchanged with the other processes after the last."""
    for part in parts[:-1]:
        with accelerator.no_sync(model):
            yield part
    yield parts[-1]


def means(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each scalar over the parts of a batch."""
    return {name: torch.stack([row[name].float() for row in rows]).mean() for name in rows[0]}


def recompute(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Keep only the inputs of the modules of these kinds, whose insides the backward pass computes again.

    Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.
    """
    for module in model.modules():
        if isinstance(module, kinds):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def split(pictures: int, most: int) -> tuple[Tensor, Tensor]:
    """Which pictures to train on, and which to measure with.

    Args:
        pictures: how many there are.
        most: how many may be held out, of at most a twentieth, spread evenly; with 0 some of those trained on are
            measured.
    """
    rows = torch.arange(pictures)
    count = max(1, min(most, pictures // 20)) if most and pictures > 1 else min(64, pictures)
    held = torch.linspace(0, pictures - 1, count).long()
    return (rows[~torch.isin(rows, held)] if count < pictures and most else rows), held


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


class Best(nn.Module):
    """The lowest loss of held-out pictures so far; part of a checkpoint."""

    loss: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("loss", torch.tensor(float("inf"), dtype=torch.float64))

    def improved(self, loss: float) -> bool:
        """Note a loss; whether it is the lowest."""
        better = loss < self.loss.item()
        if better:
            self.loss.fill_(loss)
        return better


def build_ema(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of a model's weights."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)).eval().requires_grad_(False)


def report_failures(accelerator: Accelerator, out: Path, failures: Mapping[str, str]) -> None:
    """Count the pictures that could not be read, and add them to OUT/skipped.txt. All processes call this."""
    found = {f"{name}: {why}" for part in gather_object([dict(failures)]) for name, why in part.items()}
    if found and accelerator.is_main_process:
        path = out / "skipped.txt"
        lines = sorted(found | set(path.read_text(encoding="utf-8").splitlines() if path.exists() else ()))
        write_text(path, "".join(f"{line}\n" for line in lines))
        print(f"{len(lines)} pictures could not be read, all in {path}; {lines[0]}", flush=True)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Read a .safetensors file into a model.

    Raises:
        WeightsError: it does not fit the model.
        FileNotFoundError: no such file.
    """
    weights = load_file(path)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    try:
        check_shapes(expected, weights, type(model).__name__)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    model.load_state_dict(weights)


def init_weights(model: nn.Module, config: TrainConfig) -> None:
    """Start from `config.init`, if it names weights, in place of random ones; raises as `load_weights` does."""
    if config.init:
        load_weights(model, config.init)


def save_checkpoint(accelerator: Accelerator, out: Path, step: int, config: TrainConfig) -> None:
    """Write a checkpoint of a training without settings to compare (`train.loop.checkpoint.Checkpoints`)."""
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
