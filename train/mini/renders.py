"""Emoji art from npm packages -> the renders that scenes are composed of: some 500 small files.

    npm install --prefix data/npm PACKAGES && python -m train.mini.renders --npm data/npm/node_modules --out data/emoji

(`make renders` does both.) Writes OUT/renders/STYLE/CODE.png, transparent, 160 x 160 px, of the objects in objects.txt
and of the emoji that are put on them, in both styles that scenes are painted over.
"""

from __future__ import annotations

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

import argparse
from pathlib import Path

from rich.progress import track

from clipgen.errors import DataError
from train.loop.script import command
from train.mini.attachments import ATTACHMENTS
from train.mini.emoji import read_emoji, read_sources, render
from train.mini.objects import read_objects

BASES = ("3d", "flat")
"""Styles of emoji that all styles of scenes are painted over."""


def needed_codes() -> set[str]:
    """Codes of the emoji that scenes are composed of."""
    worn = {how.source for how in ATTACHMENTS.values() if isinstance(how.source, str)}
    return worn | {thing.code for thing in read_objects().values()}


def write_renders(npm: Path, out: Path) -> int:
    """Render the needed emoji. Returns the number of files.

    Raises:
        DataError: the packages lack an emoji; nothing is left out silently.
    """
    codes = needed_codes()
    sources = [s for s in read_sources(npm, read_emoji(npm)) if s[0] in BASES and s[1] in codes]
    missing = {(base, code) for base in BASES for code in codes} - {(style, code) for style, code, _ in sources}
    if missing:
        base, code = min(missing)
        raise DataError(f"{npm} has no {base} drawing of {code} ({len(missing)} are missing); run `make renders`")
    for base in BASES:
        (out / "renders" / base).mkdir(parents=True, exist_ok=True)
    for source in track(sources, f"{len(sources)} renders"):
        render(source, out / "renders")
    return len(sources)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--npm", type=Path, default=Path("data/npm/node_modules"), help="folder of installed packages")
    parser.add_argument("--out", type=Path, default=Path("data/emoji"), help="where the renders go")
    args = parser.parse_args()
    if not (args.npm / "emojibase-data").is_dir():
        parser.error(f"{args.npm} holds no emojibase-data; `make renders` installs the packages")
    print(f"{write_renders(args.npm, args.out)} renders in {args.out / 'renders'}")


if __name__ == "__main__":
    main()
