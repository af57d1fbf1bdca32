"""Emoji art from npm packages: the renders that scenes are composed of."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from clipgen.errors import DataError
from train.mini.objects import read_objects
from train.mini.renders import PACKAGES, needed_codes, normalise, write_renders
from train.mini.sprites import SIDE

LEMON_CODE = read_objects()["lemon"].code


@pytest.fixture
def npm(tmp_path: Path) -> Path:
    """A node_modules folder with a drawing of every emoji that scenes need, in both packages."""
    glossy, flat = (tmp_path / "node_modules" / package for package in PACKAGES.values())
    (glossy / "assets").mkdir(parents=True)
    flat.mkdir(parents=True)
    codes = sorted(needed_codes())
    for code in codes:
        Image.new("RGBA", (64, 64), (9, 99, 199, 255)).save(glossy / "assets" / f"{code}.webp", lossless=True)
    icons = {f"name {code}": {"body": '<circle cx="16" cy="16" r="12" fill="gold"/>'} for code in codes}
    (flat / "icons.json").write_text(json.dumps({"icons": icons, "width": 32, "height": 32}))
    (flat / "chars.json").write_text(json.dumps({f"{code.upper()}-FE0F": f"name {code}" for code in codes}))
    return tmp_path / "node_modules"


def test_renders_keep_the_artists_colours_in_both_styles(npm: Path, tmp_path: Path) -> None:
    assert write_renders(npm, tmp_path / "out") == 2 * len(needed_codes())
    for base, middle in (("3d", (9, 99, 199, 255)), ("flat", (255, 215, 0, 255))):
        image = Image.open(tmp_path / "out" / "renders" / base / f"{LEMON_CODE}.png")
        assert image.size == (SIDE, SIDE) and image.getpixel((SIDE // 2, SIDE // 2)) == middle
    assert image.getpixel((0, 0))[3] == 0


def test_codes_are_compared_without_variation_selectors() -> None:
    assert normalise("2764-FE0F") == "2764" and normalise("1F468_200D_1F680") == "1f468-200d-1f680"


def test_package_without_an_emoji_that_scenes_need_is_named(npm: Path, tmp_path: Path) -> None:
    (npm / PACKAGES["3d"] / "assets" / f"{LEMON_CODE}.webp").unlink()
    with pytest.raises(DataError, match=f"no 3d drawing of {LEMON_CODE} .1 are missing"):
        write_renders(npm, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "train.mini.renders", "--npm", tmp_path, "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=Path(__file__).parents[3])
    assert done.returncode == 2 and f"holds no {PACKAGES['3d']}; `make renders` installs it" in done.stderr
    assert not (tmp_path / "out").exists()
