"""Checkpoints: OUT/checkpoints/step_000300/ holds everything needed to resume, and exists completely or not at all.

Accelerate writes what it prepared or was given by `register_for_checkpointing`: weights, optimizers, the scaler, the
weight average, the random states of every process. state.json has the step, which is also the position in the data
(`train.data.images.ResumableSampler`), and the configuration. A checkpoint is written under a temporary name, synced
to the disk, then renamed; only then are older ones removed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from clipgen.config import GPTConfig, VQGANConfig
from clipgen.errors import ClipGenError
from clipgen.weights.tensor_file import write_tensors
from train.config import TrainConfig
from train.loop.sharding import ShardedState

FIXED_SETTINGS = (
    *("batch_size", "seed", "held_out", "optimizer", "weight_decay", "betas", "views", "min_scale"),
    *("disc_ch", "disc_regularisation", "codes", "only_decoder", "parallel"),
)
"""Settings that a resumed training must not change; all others may change."""


class CheckpointError(ClipGenError):
    """A checkpoint or weights that cannot be written, or that belong to another training."""


def fixed_settings(config: TrainConfig, fingerprint: str, **models: VQGANConfig | GPTConfig) -> dict[str, Any]:
    """What must be the same in a checkpoint and in the training that resumes from it: name -> value.

    Args:
        fingerprint: of the data set (`clipgen.images.sources.Source.fingerprint`), wherever it lies.
        models: what is trained.
    """
    values: dict[str, Any] = {"images": fingerprint[:16]}
    values |= {name: value for name, value in asdict(config).items() if name in FIXED_SETTINGS}
    for part, model in models.items():
        values |= {f"{part}.{name}": value for name, value in asdict(model).items()}
    return values


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training.

    Attributes:
        out: the training's folder.
        keep: how many of the newest checkpoints are kept.
        fixed: what a checkpoint must have in common with the training (`fixed_settings`).
        about: more about the training for the reader of state.json, such as the whole configuration.
        sharded: models and an optimizer that are not prepared by Accelerate.
    """

    accelerator: Accelerator
    out: Path
    keep: int = 2
    fixed: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    sharded: ShardedState | None = None

    @property
    def folder(self) -> Path:
        return self.out / "checkpoints"

    def save(self, step: int) -> None:
        """Write the checkpoint of a step, then remove the oldest ones. All processes call this.

        Raises:
            CheckpointError: it could not be written; earlier ones are intact.
        """
        wait, main = self.accelerator.wait_for_everyone, self.accelerator.is_main_process
        final = self.path(step)
        temporary = final.with_suffix(".tmp")
        if main:
            self._remove_leftovers()
        wait()
        try:
            self.accelerator.save_state(str(temporary))
            if self.sharded:
                self.sharded.save(temporary / "sharded")
            wait()
            if main:
                state = {"step": step, "processes": self.accelerator.num_processes}
                state |= {"fixed": dict(self.fixed), "about": dict(self.about), "files": file_sizes(temporary)}
                (temporary / "state.json").write_text(json.dumps(state, indent=1))
                _sync_folder(temporary)
                os.replace(temporary, final)
                _sync(self.folder)
        except (OSError, SafetensorError, RuntimeError, CheckpointException) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise self._save_error(step, error) from error
        if main:
            for _, path in self.complete()[: -self.keep]:
                os.replace(path, path.with_suffix(".tmp"))  # so that a half-deleted one never looks complete
            self._remove_leftovers()
        wait()

    def load(self, step: int | None = None) -> int:
        """Restore a checkpoint into what the accelerator prepared. All processes call this.

        Args:
            step: which one; later ones are removed. None takes the newest.

        Returns:
            The step to continue from, 0 if there is no checkpoint.

        Raises:
            CheckpointError: it is damaged, is not on this machine, or belongs to another model or to a training with
                other fixed settings.
        """
        # The main process decides: another machine may see an older list of files, or another folder.
        (step,) = broadcast_object_list([self._choose(step) if self.accelerator.is_main_process else None])
        if step == 0:
            return 0
        path = self.path(step)
        if not path.is_dir():
            raise CheckpointError(f"{path} is not on this machine; all machines must share the folder of --out")
        try:
            self._restore(path)
        except CheckpointError:
            raise
        except Exception as error:  # pickle, zipfile, safetensors and DCP each raise their own
            raise self._load_error(step, error) from error
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for later in (path for other, path in self.complete() if other > step):
                os.replace(later, later.with_suffix(".tmp"))
            self._remove_leftovers()
        return step

    def _choose(self, step: int | None) -> int:
        """The step to restore: the newest one, or `step`, if there is a checkpoint of it; 0 if there is none."""
        steps = [each for each, _ in self.complete()]
        if step is None:
            return max(steps, default=0)
        if step not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise CheckpointError(f"{self.folder} has no checkpoint of step {step}; there is {there}")
        return step

    def _restore(self, path: Path) -> None:
        before = read_state(path)["fixed"]
        now = json.loads(json.dumps(dict(self.fixed)))
        changed = [
            f"{name} {before[name]}, not {now[name]}" for name in now if before.get(name, now[name]) != now[name]
        ]
        if changed:
            raise CheckpointError(
                f"{path} was trained with {'; '.join(changed)}. Continue with these, or give a new --out"
            )
        scaler = self.accelerator.scaler
        if not (path / "scaler.pt").is_file():  # saved in another precision: loss scaling starts anew
            self.accelerator.scaler = None
        try:
            self.accelerator.load_state(str(path))
        finally:
            self.accelerator.scaler = scaler
        if self.sharded:
            self.sharded.load(path / "sharded")

    def complete(self) -> list[tuple[int, Path]]:
        """Steps and folders of the complete checkpoints, oldest first."""
        paths = [state.parent for state in self.folder.glob("step_*/state.json")]
        steps = [(int(path.name[5:]), path) for path in paths if re.fullmatch(r"step_\d+", path.name)]
        return sorted(steps)

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.folder / f"step_{step:06d}"

    def _remove_leftovers(self) -> None:
        """Remove checkpoints that are too old or were never completed."""
        for path in self.folder.glob("*.tmp"):
            shutil.rmtree(path, ignore_errors=True)

    def _load_error(self, step: int, error: BaseException) -> CheckpointError:
        """Name the damage, and the newest older checkpoint that is intact."""
        intact = None
        for other, path in self.complete():
            if other < step:
                with suppress(ValueError, OSError):
                    read_state(path)
                    intact = other
        advice = "no older one is intact: delete it to start again"
        if intact is not None:
            advice = f"that of step {intact} is intact: add --resume-step {intact} to continue from it"
        return CheckpointError(f"the checkpoint {self.path(step)} is damaged ({_cause(error)}); {advice}")

    def _save_error(self, step: int, error: BaseException) -> CheckpointError:
        complete = self.complete()
        earlier = f"the checkpoint of step {complete[-1][0]} is intact" if complete else "there is no earlier one"
        return CheckpointError(
            f"step {step} could not be saved in {self.out}: {_cause(error)}; {earlier}: make room, then run it again"
        )


def read_state(path: Path) -> dict[str, Any]:
    """Read a checkpoint's state.json and check that its files have the sizes they were written with.

    Raises:
        ValueError: one is missing, cut off, or not what it should be.
        OSError: state.json cannot be read.
    """
    text = (path / "state.json").read_text(encoding="utf-8")
    try:
        state = json.loads(text)
    except ValueError as error:
        raise ValueError(f"state.json is {'no JSON' if text else 'empty'}") from error
    if not isinstance(state, dict) or not isinstance(state.get("fixed"), dict):
        raise ValueError("state.json lacks the settings of the training")
    there = file_sizes(path)
    for name, size in state.get("files", {}).items():  # checkpoints of earlier versions do not list them
        if there.get(name) != size:
            raise ValueError(f"{name} has {there.get(name, 0)} of {size} bytes")
    return state


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file in a folder except state.json, by its relative path."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "state.json")
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def save_tensors(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write a .safetensors file under a temporary name, then rename it.

    Raises:
        CheckpointError: it could not be written; a file of that name that was there is unchanged.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        write_tensors(temporary, weights)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path} could not be written: {_cause(error)}") from error


def in_half(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floating-point tensors in float16, others unchanged."""
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _cause(error: BaseException) -> str:
    """The cause in one line; every library reports a full disk in its own way."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return next(iter(text.splitlines()), type(error).__name__)


def _sync_folder(folder: Path) -> None:
    """Sync everything in a folder to the disk, so that it survives a power failure."""
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
