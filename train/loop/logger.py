"""The log of a training: a line on the terminal, scalars.csv, sample images, and TensorBoard or Weights & Biases."""

from __future__ import annotations

import csv
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from PIL import Image

from clipgen.errors import ConfigError
from clipgen.utils.files import write_text
from train.loop.health import Scalars

TRACKERS = ("tensorboard", "wandb")


def check_tracker(kind: str) -> None:
    """Check that a tracker can be used.

    Raises:
        ConfigError: Weights & Biases is asked for and not installed.
    """
    if kind == "wandb" and find_spec("wandb") is None:
        raise ConfigError("--tracker wandb needs Weights & Biases: pip install wandb, or use --tracker tensorboard")


@dataclass
class Logger:
    """Scalars to CSV, tracker and terminal; images to PNG and tracker.

    Created on the main process only. Scalars may be tensors, which are read when a line is due, so that logging does
    not stall the device in between.

    Attributes:
        start: step that training continues from; rows of later steps, logged by an earlier run, are dropped.
        tracker: "tensorboard", with its files in OUT/tensorboard, or "wandb", a run of the project "clipgen".
        config: the configuration, for the tracker.
    """

    out: Path
    steps: int
    batch_size: int
    start: int = 0
    tracker: str = "tensorboard"
    config: Mapping[str, Any] = field(default_factory=dict)
    _tracker: GeneralTracker = field(init=False, repr=False)
    _since: tuple[float, int] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        if self.tracker == "wandb":
            run = {"id": _run_id(self.out / "wandb_run.txt"), "resume": "allow", "name": self.out.name}
            self._tracker = WandBTracker("clipgen", dir=str(self.out), config=dict(self.config), **run)
        else:
            purge = self.start + 1 if self.start else None
            self._tracker = TensorBoardTracker("tensorboard", str(self.out), purge_step=purge)
        self._tracker.start()
        path = self.out / "scalars.csv"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if not line[0].isdigit() or int(line.split(",")[0]) <= self.start]
        if len(kept) < len(lines):
            write_text(path, "".join(kept))

    def scalars(self, step: int, values: Scalars) -> None:
        """Log the scalars of one step."""
        now = time.time()
        if self._since is None:
            self._since = (now, step)
        seconds, steps = now - self._since[0], step - self._since[1]
        row = {name: float(value) for name, value in values.items()}
        if steps:
            row["images_per_second"] = steps * self.batch_size / seconds
        self._tracker.log(row, step=step)
        self._append(step, row)
        left = f", {(self.steps - step) * seconds / steps / 60:.0f} min left" if steps else ""
        text = " ".join(f"{name} {value:.4g}" for name, value in row.items())
        print(f"step {step}/{self.steps} {text}{left}", flush=True)

    def _append(self, step: int, row: dict[str, float]) -> None:
        path = self.out / "scalars.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(["step", "name", "value"])
            writer.writerows((step, name, value) for name, value in row.items())

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """Save an image as OUT/NAME_STEP.png and in the tracker."""
        image.save(self.out / f"{name}_{step:06d}.png")
        pixels = np.asarray(image)[None]  # (1, H, W, 3)
        layout = {} if self.tracker == "wandb" else {"dataformats": "NHWC"}
        self._tracker.log_images({name: pixels}, step=step, **layout)

    def close(self) -> None:
        """Flush and close the tracker."""
        self._tracker.finish()


def _run_id(path: Path) -> str:
    """The run's id, which stays the same when the training is resumed."""
    if not path.is_file():
        write_text(path, uuid.uuid4().hex)
    return path.read_text()
