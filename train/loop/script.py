"""What every training script begins and ends with: its command line, its errors in one line, its exit."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object

from clipgen.utils.entry_point import entry_point
from clipgen.utils.files import write_text
from clipgen.utils.text import printable, read_lines
from train.config import Config, load_config
from train.loop.logger import TRACKERS, check_tracker
from train.loop.output import check_output


def parse_args(
    doc: str,
    paths: Mapping[str, str] | None = None,
    optional: Mapping[str, str] | None = None,
    tracked: bool = False,
) -> tuple[argparse.Namespace, Config]:
    """Parse --config, --data, --out and overrides such as stage1.lr=1e-4.

    Args:
        doc: description of the script, for --help.
        paths: more required paths, name -> help.
        optional: more optional flags, name -> help.
        tracked: whether the script is a training, which adds --minutes, --resume-step and --tracker.

    Raises:
        ConfigError: the configuration cannot work, or the tracker is not installed.
        OutputError: --out lies inside --data.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="mini", help="mini, photos, coco, imagenet, or the path of a .yaml file")
    kinds = 'folder, .txt list of paths, or .tar shards such as "data/{000000..000127}.tar", also http(s)://'
    parser.add_argument("--data", required=True, help=f"images: {kinds}, or MODULE:FUNCTION=TEXT")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, curves and sample images")
    for name, text in (paths or {}).items():
        parser.add_argument(f"--{name}", type=Path, required=True, help=text)
    for name, text in (optional or {}).items():
        parser.add_argument(f"--{name}", help=text)
    if tracked:
        parser.add_argument("--minutes", type=minutes, help="stop, saved, after so long; the same command continues")
        help_resume = "continue from this checkpoint, not the newest; later ones are removed"
        parser.add_argument("--resume-step", type=int, metavar="STEP", help=help_resume)
        parser.add_argument("--tracker", choices=TRACKERS, default=TRACKERS[0], help="where curves are shown")
    parser.add_argument("overrides", nargs="*", help="changes to the configuration, such as stage1.batch_size=16")
    args = parser.parse_intermixed_args()  # overrides may stand anywhere
    if tracked:
        check_tracker(args.tracker)
    config = load_config(args.config, args.overrides)
    check_output(args.data, args.out)
    return args, config


def minutes(text: str) -> float:
    """Parse a budget in minutes.

    Raises:
        argparse.ArgumentTypeError: not a positive number.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r}; use a positive number of minutes, such as 9")
    return value


def leave_group() -> None:
    """Destroy the process group, if there is one.

    Do it before exit: a Gloo thread that frees a tensor during shutdown aborts the process. DDP must be gone by then:
    if it holds the last reference to the group, its destructor waits for threads that wait for the GIL.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate a training script's main function; processes that end together leave their group before they exit."""

    @entry_point(stopped="stopped; the same command continues from what is saved")
    @wraps(main)
    def run() -> None:
        ended = None
        try:
            main()
        except SystemExit as stop:
            ended = SystemExit(stop.code)  # a new one: no frame of `main` is held, nor what uses the group there
        leave_group()
        if ended is not None:
            raise ended

    return run


def list_failures(accelerator: Accelerator, out: Path, failures: Mapping[str, str]) -> list[str]:
    """Add unreadable images to OUT/skipped.txt. All processes call this.

    Args:
        failures: name -> reason, as far as this process knows.

    Returns:
        On the main process, all lines of the file, sorted.
    """
    lines = {f"{name}: {reason}" for part in gather_object([dict(failures)]) for name, reason in part.items()}
    if not accelerator.is_main_process:
        return []
    path = out / "skipped.txt"
    before = set(read_lines(path, errors="surrogateescape") if path.exists() else ())
    if lines - before:
        write_text(path, "".join(f"{line}\n" for line in sorted(lines | before)))
    return sorted(lines | before)


def report_failures(accelerator: Accelerator, out: Path, failures: Mapping[str, str]) -> None:
    """Add unreadable images to OUT/skipped.txt and print how many there are; as `list_failures`."""
    if lines := list_failures(accelerator, out, failures):
        count, path = len(lines), out / "skipped.txt"
        print(f"{count} images could not be read, all listed in {path}; {printable(lines[0])}", flush=True)
