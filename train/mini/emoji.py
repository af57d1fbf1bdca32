"""The mini model's images: emoji art from npm packages, rendered and composed into a folder of pictures.

    npm install --prefix data/npm PACKAGES && python -m train.mini.emoji --npm data/npm/node_modules --out data/emoji

(`make emoji` does both.) Writes, under --out:

    renders/STYLE/CODE.png   every emoji in every style, transparent, as the artists drew it
    train/*.png              what CLIP and the VQGAN train on: one or two emoji on plain backgrounds
    stage2/*.png             what the GPT draws: one centred emoji in two styles, on colours, and two along the diagonal
    seen/*.png               the same as CLIP knows it: two side by side
    heldout/*.png            renders whose emoji the models know only in other styles
    unseen/*.png             emoji that no model has seen in any style
    */metadata.jsonl         file_name, objects, style and background of each picture
    emoji.jsonl              code, name, keywords and group of each emoji
"""

from __future__ import annotations

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

import argparse
import io
import json
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import resvg_py
from PIL import Image
from rich.console import Console
from rich.progress import track

from clipgen.utils.entry_point import entry_point
from train.loop.arguments import at_least
from train.mini.captions import COLOURS, STYLES, Emoji
from train.mini.sprites import SIDE

SETS = {
    "fluent": "@iconify-json/fluent-emoji",
    "flat": "@iconify-json/fluent-emoji-flat",
    "noto": "@iconify-json/noto",
    "twemoji": "@iconify-json/twemoji",
    "line": "@iconify-json/fluent-emoji-high-contrast",
}
WEBP_SET = "@lobehub/fluent-emoji-3d"
LICENCES = {
    "@iconify-json/fluent-emoji": "MIT, Microsoft",
    "@iconify-json/fluent-emoji-flat": "MIT, Microsoft",
    "@iconify-json/fluent-emoji-high-contrast": "MIT, Microsoft",
    "@lobehub/fluent-emoji-3d": "MIT, Microsoft and LobeHub",
    "@iconify-json/noto": "Apache-2.0, Google",
    "@iconify-json/twemoji": "CC BY 4.0, Twitter and contributors",
    "emojibase-data": "MIT, Miles Johnson",
}
_DRAWN = {"3d": 11, "line": 1}
"""Styles that the GPT learns, and on how many colours beside white each of their renders is put. Two styles that cannot
be taken for each other: of four drawings of a rat, a model of this size drew the mean. A colour that a thing was not
shown on came out white."""
_PEOPLE = 1  # too much alike to be told apart where there are two of them
_SYMBOLS = 8  # arrows, signs, buttons
_SKIP_GROUPS = {2, 9}  # skin-tone components; flags, which are letters to a model of this size


def normalise(code: str) -> str:
    """Code points as lower-case hexadecimal joined by "-", without variation selectors: "2764", "1f468-200d-1f680"."""
    return "-".join(part for part in code.lower().replace("_", "-").split("-") if part != "fe0f")


def read_emoji(npm: Path) -> list[Emoji]:
    """The base emoji: no skin tones, flags, families, nor the gendered twins of a neutral person."""
    entries = json.loads((npm / "emojibase-data/en/data.json").read_text())
    emoji = []
    for entry in entries:
        code = normalise(entry["hexcode"])
        composite = "200d" in code.split("-")
        if entry.get("group") is None or entry["group"] in _SKIP_GROUPS:
            continue
        if composite and ("gender" in entry or entry["label"].startswith(("family", "couple", "kiss"))):
            continue
        name = entry["label"].replace("“", "").replace("”", "").replace(":", "").strip()
        keywords = tuple(tag for tag in entry.get("tags", ()) if tag != name and tag.isascii())
        emoji.append(Emoji(code, name, keywords, entry["group"]))
    return emoji


def read_sources(npm: Path, emoji: list[Emoji]) -> Iterator[tuple[str, str, str | Path]]:
    """Yield (style, code, source) for each drawing: SVG text, or the path of a WebP file."""
    wanted = {e.code for e in emoji}
    chars = {s: _load(npm, p, "chars.json") for s, p in SETS.items() if (npm / p / "chars.json").is_file()}
    chars["fluent"] = chars["flat"]  # the same names; this package ships no table of its own
    for style, package in SETS.items():
        icons = _load(npm, package, "icons.json")
        for code, name in {normalise(c): n for c, n in chars[style].items()}.items():
            icon = icons["icons"].get(name)
            if code in wanted and icon is not None:
                width = icon.get("width", icons.get("width", 16))
                height = icon.get("height", icons.get("height", 16))
                head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
                yield style, code, f"{head}{icon['body']}</svg>"
    for path in sorted((npm / WEBP_SET / "assets").glob("*.webp")):
        if normalise(path.stem) in wanted:
            yield "3d", normalise(path.stem), path


def _load(npm: Path, package: str, file: str) -> dict:
    return json.loads((npm / package / file).read_text())


def render(source: tuple[str, str, str | Path], out: Path) -> None:
    """Draw one source at SIDE on a transparent ground into out/STYLE/CODE.png."""
    style, code, drawing = source
    if isinstance(drawing, Path):
        image = Image.open(drawing).convert("RGBA")
    else:
        png = resvg_py.svg_to_bytes(svg_string=drawing, width=SIDE, height=SIDE)
        image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    image = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    image.save(out / style / f"{code}.png", compress_level=1)


def compose(sprites: list[Image.Image], colour: tuple[int, int, int], size: int, rng: random.Random) -> Image.Image:
    """One or two sprites on a plain background, at random scales and positions, RGB, size x size."""
    canvas = Image.new("RGBA", (size, size), (*colour, 255))
    half = size // 2
    for i, sprite in enumerate(sprites):
        if len(sprites) == 1:
            side = int(size * rng.uniform(0.62, 0.98))
            x, y = (rng.randint(0, size - side) for _ in range(2))
        else:
            side = int(size * rng.uniform(0.46, 0.56))
            x = max(0, min(size - side, i * half + (half - side) // 2 + rng.randint(-4, 4)))
            y = rng.randint(int((size - side) * 0.25), int((size - side) * 0.75))
        layer = sprite.resize((side, side), Image.Resampling.LANCZOS)
        canvas.alpha_composite(layer, (x, y))
    return canvas.convert("RGB")


def centred(sprites: list[Image.Image], size: int, colour: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """One sprite in the middle, 92 % of the frame, or two side by side, half as large, RGB."""
    canvas = Image.new("RGBA", (size, size), (*colour, 255))
    side = round(size * (0.92 if len(sprites) == 1 else 0.48))
    for i, sprite in enumerate(sprites):
        x = (2 * i + 1) * size // (2 * len(sprites)) - side // 2
        canvas.alpha_composite(sprite.resize((side, side), Image.Resampling.LANCZOS), (x, (size - side) // 2))
    return canvas.convert("RGB")


def diagonal(sprites: list[Image.Image], size: int) -> Image.Image:
    """Two sprites on white in opposite corners, the first above, RGB.

    Larger than side by side, and they hardly meet. Each covers 7 x 7 of the VQGAN's 12 x 12 tokens, so that a thing
    looks the same to it in both corners.
    """
    canvas = Image.new("RGBA", (size, size), "white")
    side = round(size * 7 / 12)
    for sprite, corner in ((sprites[1], size - side), (sprites[0], 0)):
        canvas.alpha_composite(sprite.resize((side, side), Image.Resampling.LANCZOS), (corner, corner))
    return canvas.convert("RGB")


def plan(renders: list[tuple[str, str]], views: int, pairs: int, seed: int) -> list[dict]:
    """What to draw: `views` of each render, the first centred, then `pairs` of two objects.

    Returns metadata records; each carries the seed of its own randomness, so any worker can draw any record.
    """
    rng = random.Random(seed)
    records = []
    by_style: dict[str, list[str]] = {}
    for style, code in renders:
        by_style.setdefault(style, []).append(code)
        for view in range(views):
            background = "white" if view < 2 else rng.choice(_backgrounds(style))
            records.append(_record([code], style, background, "centred" if view == 0 else "scattered", rng))
    for _ in range(pairs):
        style = rng.choice(sorted(by_style))
        codes = rng.sample(by_style[style], 2)
        background = "white" if rng.random() < 0.6 else rng.choice(_backgrounds(style))
        records.append(_record(codes, style, background, "scattered", rng))
    return _numbered(records)


def plan_drawn(renders: list[tuple[str, str]], people: set[str], pairs: int, seed: int) -> list[dict]:
    """What to draw for the GPT: each render centred, on white and on colours, then 3D on white in the corners: each
    twice, and `pairs` of two that differ and are not `people`, who are too much alike at that size."""
    rng = random.Random(seed)
    records = [
        _record([code], style, background, "centred", rng)
        for style, code in renders
        for background in ["white", *rng.sample(_backgrounds(style), _DRAWN[style])]
    ]
    glossy = [code for style, code in renders if style == "3d" and code not in people]
    two = [[code, code] for code in glossy] + [rng.sample(glossy, 2) for _ in range(pairs)]
    records += [_record(codes, "3d", "white", "diagonal", rng) for codes in two]
    return _numbered(records)


def _numbered(records: list[dict]) -> list[dict]:
    for i, record in enumerate(records):
        record["file_name"] = f"{i:06d}.png"
    return records


def _backgrounds(style: str) -> list[str]:
    """Colours, without white, that can lie behind a style: black lines vanish on dark ones."""
    dark = {"white", "black", "brown", "purple", "blue"} if style == "line" else {"white"}
    return [name for name in COLOURS if name not in dark]


def _record(codes: list[str], style: str, background: str, layout: str, rng: random.Random) -> dict:
    return {
        "file_name": "",
        "objects": codes,
        "style": style,
        "background": background,
        "layout": layout,
        "seed": rng.getrandbits(32),
    }


def draw(record: dict, renders: Path, out: Path, size: int) -> None:
    """Draw one record into out/file_name."""
    rng = random.Random(record["seed"])
    sprites = [Image.open(renders / record["style"] / f"{code}.png").convert("RGBA") for code in record["objects"]]
    if record["layout"] == "diagonal":
        image = diagonal(sprites, size)
    elif record["layout"] == "centred":
        image = centred(sprites, size, COLOURS[record["background"]])
    else:
        jitter = 0 if record["background"] == "white" else 12
        r, g, b = (max(0, min(255, c + rng.randint(-jitter, jitter))) for c in COLOURS[record["background"]])
        if rng.random() < 0.5:
            sprites = [s.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for s in sprites]
        image = compose(sprites, (r, g, b), size, rng)
    image.save(out / record["file_name"], compress_level=1)


def write_split(name: str, records: list[dict], out: Path, size: int, pool: ProcessPoolExecutor) -> None:
    """Draw a split and write its metadata last, so that a folder with metadata is a complete one."""
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    work = partial(draw, renders=out / "renders", out=folder, size=size)
    for _ in track(pool.map(work, records, chunksize=64), f"{name} ({len(records)})", len(records)):
        pass
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metadata.jsonl").write_text(lines)


@entry_point()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--npm", type=Path, default=Path("data/npm/node_modules"), help="folder of installed packages")
    parser.add_argument("--out", type=Path, default=Path("data/emoji"), help="where the pictures go")
    parser.add_argument("--size", type=at_least(1), default=144, help="side of a picture, px")
    parser.add_argument("--views", type=at_least(1), default=3, help="pictures of one emoji, for each of its styles")
    parser.add_argument("--pairs", type=at_least(0), default=6000, help="pictures of two emoji, for CLIP and the VQGAN")
    parser.add_argument("--drawn-pairs", type=at_least(0), default=20_000, help="pictures of two emoji, for the GPT")
    parser.add_argument("--heldout", type=at_least(0), default=300, help="Noto renders to keep from training")
    parser.add_argument("--unseen", type=at_least(0), default=40, help="emoji to keep from training in every style")
    parser.add_argument("--workers", type=at_least(1), default=2, help="processes")
    parser.add_argument("--seed", type=at_least(0), default=0)
    args = parser.parse_args()
    if not (args.npm / "emojibase-data").is_dir():
        parser.error(
            f"{args.npm} holds no emojibase-data; `make emoji` installs the packages, or name their node_modules"
        )

    console = Console()
    for package, licence in LICENCES.items():
        console.print(f"{package}: {licence}")
    emoji = read_emoji(args.npm)
    sources = list(read_sources(args.npm, emoji))
    for style in STYLES:
        (args.out / "renders" / style).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(args.workers) as pool:
        work = partial(render, out=args.out / "renders")
        for _ in track(pool.map(work, sources, chunksize=32), f"renders ({len(sources)})", len(sources)):
            pass
        group = {e.code: e.group for e in emoji}
        splits = split([(style, code) for style, code, _ in sources], group, args)
        for name, records in splits.items():
            write_split(name, records, args.out, args.size, pool)
    drawn = {code for _, code, _ in sources}
    lines = "".join(json.dumps(asdict(e)) + "\n" for e in emoji if e.code in drawn)
    (args.out / "emoji.jsonl").write_text(lines)
    console.print(f"{len(drawn)} emoji, {len(sources)} renders -> {args.out}")


def split(renders: list[tuple[str, str]], group: dict[str, int], args: argparse.Namespace) -> dict[str, list[dict]]:
    """Records of train, stage2 and seen, of heldout (some Noto renders) and unseen (some emoji in every style)."""
    rng = random.Random(args.seed)
    styles_of: dict[str, int] = {}
    for _, code in renders:
        styles_of[code] = styles_of.get(code, 0) + 1
    common = sorted(code for code, n in styles_of.items() if n == len(STYLES))
    rng.shuffle(common)
    unseen, rest = set(common[: args.unseen]), common[args.unseen :]
    heldout = {("noto", code) for code in rest[: args.heldout]}
    train = [r for r in renders if r not in heldout and r[1] not in unseen]
    drawable = [(style, code) for style, code in train if style in _DRAWN and group[code] != _SYMBOLS]
    people = {code for code, number in group.items() if number == _PEOPLE}
    drawn = plan_drawn(drawable, people, args.drawn_pairs, args.seed)
    return {
        "train": plan(train, args.views, args.pairs, args.seed),
        "stage2": drawn,
        "seen": [record | {"layout": "centred"} for record in drawn],
        "heldout": plan(sorted(heldout), 1, 0, args.seed),
        "unseen": plan([r for r in renders if r[1] in unseen], 1, 0, args.seed),
    }


if __name__ == "__main__":
    main()
