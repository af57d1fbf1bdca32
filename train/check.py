"""Check a data set before training.

    python -m train.check photos --out runs/check
    python -m train.check "data/{000000..000127}.tar" --size 256

Reads every image once and reports how many are usable, their sizes, near-duplicates, and unused files. With --out it
also writes report.json, unreadable.txt, duplicates.txt and contact.png. The exit code is 1 if no image is usable, 2 if
there are none.
"""

from __future__ import annotations

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

import argparse
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

from clipgen.errors import DataError
from clipgen.images.pixels import grid, load_image, save_image
from clipgen.images.sources import Source, describe_unused, open_source, spread_rows
from clipgen.utils.cpu import thread_count, usable_cores
from clipgen.utils.entry_point import entry_point
from clipgen.utils.files import write_text
from clipgen.utils.text import printable
from train.data.images import reason
from train.loop.arguments import at_least
from train.loop.output import check_output

ALIKE = 3
"""Hashes of near-duplicates differ in at most this many of their 64 bits."""
SHEET = 100
"""Images on the contact sheet."""


@dataclass(frozen=True)
class CheckedImage:
    """Result of checking one image; `problem` is "" if it can be used."""

    name: str
    problem: str = ""
    width: int = 0
    height: int = 0
    hash: int = 0


def dhash(image: Image.Image) -> int:
    """64-bit difference hash: whether each cell of a 9 x 8 grey thumbnail is brighter than its left neighbour."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


def examine(source: Source, index: int) -> CheckedImage:
    """Read one image as training would."""
    name = source.names[index]
    try:
        image = load_image(source.read(index))
    except (DataError, OSError) as error:
        return CheckedImage(name, reason(error))
    return CheckedImage(name, "", image.width, image.height, dhash(image))


def examine_all(source: Source, workers: int) -> list[CheckedImage]:
    """`examine` every image in `workers` processes, with a progress bar."""
    count = len(source.names)
    chunk = max(1, min(64, count // (4 * workers)))
    # Each worker gets the list of names once, not with every image.
    with ProcessPoolExecutor(min(workers, count), initializer=_take, initargs=(source,)) as pool:
        return list(track(pool.map(_examine_taken, range(count), chunksize=chunk), f"reading {count} images", count))


_taken: list[Source] = []


def _take(source: Source) -> None:
    _taken[:] = [source]


def _examine_taken(index: int) -> CheckedImage:
    return examine(_taken[0], index)


def near_duplicates(hashes: Sequence[int]) -> list[list[int]]:
    """Groups of rows whose 64-bit hashes differ in at most `ALIKE` bits, directly or through others of the group.

    Two hashes that differ in 3 bits agree in one of their four 16-bit quarters, so only those are compared.
    """
    rows_of: dict[int, list[int]] = defaultdict(list)
    for row, value in enumerate(hashes):
        rows_of[value].append(row)
    values = list(rows_of)
    parent = list(range(len(values)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for shift in (0, 16, 32, 48):
        bins: dict[int, list[int]] = defaultdict(list)
        for i, value in enumerate(values):
            bins[value >> shift & 0xFFFF].append(i)
        for members in bins.values():
            for first, second in _close(np.array([values[i] for i in members], dtype=np.uint64)):
                parent[root(members[first])] = root(members[second])
    groups: dict[int, list[int]] = defaultdict(list)
    for i, value in enumerate(values):
        groups[root(i)] += rows_of[value]
    return sorted(sorted(rows) for rows in groups.values() if len(rows) > 1)


def _close(values: np.ndarray) -> Iterator[tuple[int, int]]:
    for i in range(len(values) - 1):
        for j in np.flatnonzero(np.bitwise_count(values[i + 1 :] ^ values[i]) <= ALIKE):
            yield i, i + 1 + int(j)


def summary(source: Source, images: Sequence[CheckedImage], groups: Sequence[Sequence[int]], size: int) -> list[str]:
    """The lines of the report."""
    good = [p for p in images if not p.problem]
    bad = [p for p in images if p.problem]
    lines = [f"{len(images)} images: {len(good)} can be used, {len(bad)} cannot"]
    if source.unused:
        lines.append(describe_unused(source))
    lines += [f"  {count} x {problem}" for problem, count in Counter(p.problem for p in bad).most_common(5)]
    if not good:
        return [*lines, "Training is not possible: no image can be read."]
    sides = sorted(min(p.width, p.height) for p in good)
    lines.append(f"shorter side: {sides[0]} to {sides[-1]} px, half of them at least {sides[len(sides) // 2]} px")
    small = sum(side < size for side in sides)
    if small:
        lines.append(f"{small} are smaller than {size} px and will be upscaled: the model will learn to blur")
    long = sum(max(p.width, p.height) > 2 * min(p.width, p.height) for p in good)
    if long:
        lines.append(f"{long} have one side more than twice the other: training uses a square crop of each")
    again = sum(len(group) - 1 for group in groups)
    if again:
        lines.append(f"{again} are near-duplicates of another ({len(groups)} groups): the model may memorise them")
    if len(good) < 1000:
        lines.append(f"{len(good)} images are enough for a trial, but too few to generate new images from")
    return lines


def contact_sheet(source: Source, good: Sequence[int]) -> Image.Image:
    """At most `SHEET` of the usable images, spread over the set, as thumbnails."""
    chosen = [good[row] for row in spread_rows(len(good), SHEET)]
    thumbnails = []
    for index in chosen:
        image = load_image(source.read(index))
        image.thumbnail((96, 96), Image.Resampling.BICUBIC)
        thumbnails.append(image)
    return grid(thumbnails, columns=math.ceil(len(thumbnails) ** 0.5))


def write_report(
    out: Path, source: Source, images: Sequence[CheckedImage], groups: Sequence[Sequence[int]], lines: Sequence[str]
) -> None:
    """Write the report, lists and contact sheet into a folder. Names that are not UTF-8 keep their bytes."""
    good = [i for i, p in enumerate(images) if not p.problem]
    write_text(out / "report.json", json.dumps({"summary": lines, "pictures": [asdict(p) for p in images]}, indent=1))
    write_text(out / "unreadable.txt", "".join(f"{p.name}: {p.problem}\n" for p in images if p.problem))
    paragraphs = ["".join(f"{images[good[row]].name}\n" for row in group) for group in groups]
    write_text(out / "duplicates.txt", "\n".join(paragraphs))
    if good:
        save_image(contact_sheet(source, good), out / "contact.png")


@entry_point()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder, .txt list of paths, .tar shards, or a pattern of any of them")
    parser.add_argument("--out", type=Path, help="folder for the report, the lists and the contact sheet")
    parser.add_argument("--size", type=at_least(1), default=256, help="side of the images that training will see, px")
    cores = thread_count(usable_cores())
    parser.add_argument("--workers", type=at_least(1), default=cores, help="processes that read")
    args = parser.parse_args()
    source = open_source(args.data)
    if args.out:
        check_output(args.data, args.out)  # the contact sheet would become a training image
        args.out.mkdir(parents=True, exist_ok=True)
    images = examine_all(source, args.workers)
    groups = near_duplicates([image.hash for image in images if not image.problem])
    lines = summary(source, images, groups, args.size)
    print("\n".join(lines))
    for image in [image for image in images if image.problem][:20]:
        print(f"unreadable: {printable(image.name)}: {printable(image.problem)}")
    if args.out:
        write_report(args.out, source, images, groups, lines)
        print(f"report, lists and contact sheet: {printable(str(args.out))}")
    if all(image.problem for image in images):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
