"""Emoji art from npm packages -> the renders that scenes are composed of: some 300 small files.

    npm install --prefix data/npm PACKAGES && python -m train.mini.renders --npm data/npm/node_modules --out data/emoji

(`make renders` does both.) Writes OUT/renders/STYLE/CODE.png, transparent, 160 x 160 px, of the objects in objects.txt
and of the emoji that are put on them, in both styles that scenes are painted over.
"""

from __future__ import annotations

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

import argparse
import io
import json
from pathlib import Path
from typing import Any

import resvg_py
from PIL import Image
from rich.progress import track

from clipgen.errors import DataError
from train.loop.script import command
from train.mini.attachments import ATTACHMENTS
from train.mini.objects import read_objects
from train.mini.sprites import SIDE

PACKAGES = {"3d": "@lobehub/fluent-emoji-3d", "flat": "@iconify-json/fluent-emoji-flat"}
"""Style of emoji -> its npm package: WebP files, and SVG in one JSON file. All styles of scenes are painted over one of
the two."""


def needed_codes() -> set[str]:
    """Codes of the emoji that scenes are composed of."""
    worn = {how.source for how in ATTACHMENTS.values() if isinstance(how.source, str)}
    return worn | {thing.code for thing in read_objects().values()}


def normalise(code: str) -> str:
    """Code points as lower-case hexadecimal joined by "-", without variation selectors: "2764", "1f468-200d-1f680"."""
    return "-".join(part for part in code.lower().replace("_", "-").split("-") if part != "fe0f")


def write_renders(npm: Path, out: Path) -> int:
    """Render the needed emoji. Returns the number of files.

    Raises:
        DataError: the packages lack an emoji; nothing is left out silently.
    """
    codes = needed_codes()
    drawings = {("3d", code): path for code, path in _find_files(npm / PACKAGES["3d"]).items()}
    drawings |= {("flat", code): svg for code, svg in _read_svg(npm / PACKAGES["flat"]).items()}
    wanted = sorted((base, code) for base in PACKAGES for code in codes)
    missing = [key for key in wanted if key not in drawings]
    if missing:
        base, code = missing[0]
        raise DataError(f"{npm} has no {base} drawing of {code} ({len(missing)} are missing); run `make renders`")
    for base in PACKAGES:
        (out / "renders" / base).mkdir(parents=True, exist_ok=True)
    for base, code in track(wanted, f"{len(wanted)} renders"):
        image = _render(drawings[base, code])
        image.save(out / "renders" / base / f"{code}.png", compress_level=1)
    return len(wanted)


def _find_files(package: Path) -> dict[str, Path | str]:
    """Code -> WebP file."""
    return {normalise(path.stem): path for path in sorted((package / "assets").glob("*.webp"))}


def _read_svg(package: Path) -> dict[str, Path | str]:
    """Code -> SVG text, from Iconify's tables of codes and of drawings."""
    chars, icons = (_read_json(package / file) for file in ("chars.json", "icons.json"))
    found: dict[str, Path | str] = {}
    for char, name in chars.items():
        if (icon := icons["icons"].get(name)) is not None:
            width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
            head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
            found[normalise(char)] = f"{head}{icon['body']}</svg>"
    return found


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _render(drawing: Path | str) -> Image.Image:
    """A drawing of SIDE x SIDE on a transparent ground."""
    if isinstance(drawing, Path):
        image = Image.open(drawing).convert("RGBA")
    else:
        png = resvg_py.svg_to_bytes(svg_string=drawing, width=SIDE, height=SIDE)
        image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--npm", type=Path, default=Path("data/npm/node_modules"), help="folder of installed packages")
    parser.add_argument("--out", type=Path, default=Path("data/emoji"), help="where the renders go")
    args = parser.parse_args()
    for package in PACKAGES.values():
        if not (args.npm / package).is_dir():
            parser.error(f"{args.npm} holds no {package}; `make renders` installs it")
    print(f"{write_renders(args.npm, args.out)} renders in {args.out / 'renders'}")


if __name__ == "__main__":
    main()
