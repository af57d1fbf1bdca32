"""A contact sheet of the world: what there is, then scenes drawn at random with a sentence for each.

python -m train.mini.sheet --data data/emoji --out outputs/scenes.png        (or `make scenes`)
"""

from __future__ import annotations

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

import argparse
import random
from pathlib import Path
from textwrap import wrap

import cv2
import numpy as np
from PIL import Image

from clipgen.images.pixels import save_image
from clipgen.utils.entry_point import entry_point
from train.loop.arguments import at_least
from train.mini.attachments import ATTACHMENTS, can_have, kinds_of
from train.mini.colours import COLOURS, Bytes
from train.mini.describe import describe
from train.mini.facts import PLACES, RELATIONS, STYLES, Facts, Thing, is_held_out
from train.mini.objects import read_objects
from train.mini.sampling import draw_facts
from train.mini.scene import Composer

COLUMNS = 14
_CAPTION = 30
"""Height of a caption, px."""


def chapters(rng: random.Random) -> list[tuple[str, list[Facts]]]:
    """Sections of the sheet: titles and example scenes."""
    objects = list(read_objects().values())

    def any_name() -> str:
        return rng.choice(objects).name

    def wearing(attachment: str) -> Facts:
        thing = rng.choice([thing for thing in objects if can_have(thing, attachment)])
        return Facts((Thing(thing.name, None, attachment, rng.choice(kinds_of(attachment))),), "3d", "white")

    def two(relation: str) -> Facts:
        first, second = rng.sample(objects, 2)
        return Facts((Thing(first.name), Thing(second.name)), "3d", "white", relation=relation)

    styled = [Facts((Thing(name),), style, "light blue") for name in ("dog", "castle") for style in STYLES]
    return [
        ("attachments", [wearing(name) for name in [*ATTACHMENTS, *["hair"] * 6]]),
        ("colors", [Facts((Thing(any_name(), colour),), "3d", "white") for colour in COLOURS]),
        ("styles", styled),
        ("places", [Facts((Thing(any_name()),), "3d", place) for place in PLACES]),
        ("two things, and three of one", [two(relation) for relation in RELATIONS]),
        ("", [Facts((Thing(any_name()),), "3d", "white", count=n) for n in (2, 2, 3, 3)]),
    ]


def build_sheet(composer: Composer, scenes: int, seed: int) -> Bytes:
    """The sheet, RGB (H, W, 3), with so many random scenes at its end; what is held out has a red frame."""
    rng = random.Random(seed)
    rows: list[Bytes] = []
    width = COLUMNS * composer.size
    for title, some in [*chapters(rng), ("scenes", [draw_facts(rng) for _ in range(scenes)])]:
        if title:
            rows.append(_text(title, width, 34, 0.8))
        for start in range(0, len(some), COLUMNS):
            cells = [_cell(composer, facts, rng) for facts in some[start : start + COLUMNS]]
            blank = np.full_like(cells[0], 255)
            rows.append(np.hstack(cells + [blank] * (COLUMNS - len(cells))))
    return np.vstack(rows)


def _cell(composer: Composer, facts: Facts, rng: random.Random) -> Bytes:
    image = composer.compose(facts, rng.getrandbits(32))
    if is_held_out(facts):
        cv2.rectangle(image, (0, 0), (composer.size - 1, composer.size - 1), (230, 30, 30), 2)
    lines = wrap(describe(facts, rng), 25)
    caption = [_text(line, composer.size, _CAPTION // 3, 0.27) for line in [*lines, "", ""][:3]]
    return np.vstack([image, *caption])


def _text(text: str, width: int, height: int, scale: float) -> Bytes:
    row = np.full((height, width, 3), 255, np.uint8)
    cv2.putText(row, text, (3, height - 3), cv2.FONT_HERSHEY_SIMPLEX, scale, (40, 40, 40), 1, cv2.LINE_AA)
    return row


@entry_point()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="what `make renders` wrote")
    parser.add_argument("--out", type=Path, default=Path("outputs/scenes.png"), help="where the sheet goes")
    parser.add_argument("--scenes", type=at_least(1), default=72, help="random scenes")
    parser.add_argument("--seed", type=at_least(0), default=0)
    args = parser.parse_args()
    sheet = build_sheet(Composer(args.data / "renders"), args.scenes, args.seed)
    save_image(Image.fromarray(sheet), args.out)
    print(f"{args.out}: {sheet.shape[1]} x {sheet.shape[0]} px; a red frame: held out from the GPT")


if __name__ == "__main__":
    main()
