"""Checkpoints: OUT/checkpoints/step_000300/ holds everything that going on needs, and is there whole or not at all.

Accelerate writes what it prepared or was given by `register_for_checkpointing`: weights, optimizers, the scaler, the
moving average, the random states of every process. state.json says the step, which is also the position in the data
(`train.data.images.Order`), and the configuration. It is written under
a temporary name, forced to the disk, then renamed; only then do older ones go.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from clipgen.config import GPTConfig, VQGANConfig
from clipgen.errors import ClipGenError
from train.config import TrainConfig
from train.loop.sharding import Sharded

KEPT_TO_THE_END = (
    *("batch_size", "seed", "held_out", "optimizer", "weight_decay", "betas", "views", "min_scale"),
    *("disc_ch", "disc_regularisation", "codes", "parallel"),
)
"""Settings with another value of which it would not be the training that was begun; the others may change."""


class CheckpointError(ClipGenError):
    """A checkpoint or weights that cannot be written, or belong to another training; the message says what to do."""


def fixed_settings(config: TrainConfig, **models: VQGANConfig | GPTConfig) -> dict[str, Any]:
    """What may not change between a checkpoint and the training that goes on from it: name -> value."""
    values = {name: value for name, value in asdict(config).items() if name in KEPT_TO_THE_END}
    for part, model in models.items():
        values |= {f"{part}.{name}": value for name, value in asdict(model).items()}
    return values


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training.

    Attributes:
        out: the training's folder.
        keep: how many of the newest stay.
        fixed: what a checkpoint must have in common with the training (`fixed_settings`).
        about: anything else worth knowing, such as the whole configuration; for the reader.
        sharded: models and an optimizer that Accelerate knows nothing of.
    """

    accelerator: Accelerator
    out: Path
    keep: int = 2
    fixed: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    sharded: Sharded | None = None

    @property
    def folder(self) -> Path:
        return self.out / "checkpoints"

    def save(self, step: int) -> None:
        """Write the checkpoint of a step, then remove the oldest. All processes call this.

        Raises:
            CheckpointError: it could not be written; those before it are intact.
        """
        wait, main = self.accelerator.wait_for_everyone, self.accelerator.is_main_process
        final = self.folder / f"step_{step:06d}"
        temporary = final.with_suffix(".tmp")
        if main:
            self._clear()
        wait()
        try:
            self.accelerator.save_state(str(temporary))
            if self.sharded:
                self.sharded.save(temporary / "sharded")
            wait()
            if main:
                state = {"step": step, "processes": self.accelerator.num_processes}
                state |= {"fixed": dict(self.fixed), "about": dict(self.about)}
                (temporary / "state.json").write_text(json.dumps(state, indent=1))
                _force(temporary)
                os.replace(temporary, final)
                _sync(self.folder)
        except (OSError, SafetensorError, RuntimeError, CheckpointException) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise self._unsaved(step, error) from error
        if main:
            for _, path in self.complete()[: -self.keep]:
                os.replace(path, path.with_suffix(".tmp"))  # never half of one under its name
            self._clear()
        wait()

    def load(self) -> int:
        """Restore the newest checkpoint into what the accelerator prepared; the step to go on from, 0 without one.

        Raises:
            CheckpointError: it is of another model, or of a training with other fixed settings.
        """
        complete = self.complete()
        if not complete:
            return 0
        step, path = complete[-1]
        before = json.loads((path / "state.json").read_text())["fixed"]
        now = json.loads(json.dumps(dict(self.fixed)))
        changed = [
            f"{name} {before[name]}, not {now[name]}" for name in now if before.get(name, now[name]) != now[name]
        ]
        if changed:
            raise CheckpointError(
                f"{path} was trained with {'; '.join(changed)}. Go on with these, or give a new --out"
            )
        self.accelerator.load_state(str(path))
        if self.sharded:
            self.sharded.load(path / "sharded")
        return step

    def complete(self) -> list[tuple[int, Path]]:
        """Steps and folders of the checkpoints that are whole, oldest first."""
        paths = [path.parent for path in self.folder.glob("step_*/state.json") if path.parent.suffix != ".tmp"]
        return sorted((int(path.name.removeprefix("step_")), path) for path in paths)

    def _clear(self) -> None:
        """Remove what is too old, and what a run that was killed while it saved has left."""
        for rest in self.folder.glob("*.tmp"):
            shutil.rmtree(rest, ignore_errors=True)

    def _unsaved(self, step: int, error: BaseException) -> CheckpointError:
        complete = self.complete()
        rest = f"the checkpoint of step {complete[-1][0]} is intact" if complete else "there is none before it"
        return CheckpointError(
            f"step {step} could not be saved in {self.out}: {_cause(error)}; {rest}: make room, then run it again"
        )


def save_tensors(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write safetensors under a temporary name, then rename.

    Raises:
        CheckpointError: it could not be written; a file that was there is intact.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path} could not be written: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    """What went wrong, in one line: each library says it in its own way that a disk is full."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error).splitlines()[0]


def _force(folder: Path) -> None:
    """Have the contents of a folder on the disk itself: a machine that is switched off keeps them."""
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
