"""The ablation of stage 2: its choice of emoji and its tables."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import ablation
import pytest
from PIL import Image
from prompts import Prompt


@pytest.fixture
def emoji(tmp_path: Path) -> Path:
    """Six emoji in two styles, one of them on a colour too."""
    records = [
        {"file_name": f"{i:02}.png", "objects": [code], "style": style, "background": background}
        for i, (code, style, background) in enumerate(
            [(code, style, "white") for code in "abcdef" for style in ("3d", "line")] + [("a", "3d", "blue")]
        )
    ]
    folder = tmp_path / "emoji" / "stage2"
    folder.mkdir(parents=True)
    for record in records:
        Image.new("RGB", (8, 8)).save(folder / record["file_name"])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder.parent / "emoji.jsonl").write_text("")
    return folder.parent


def test_emoji_of_the_prompts_are_chosen_first(emoji: Path, tmp_path: Path) -> None:
    files = ablation.choose_images(emoji, [Prompt("object", "an e", (("e", "f"),))], 3, tmp_path / "out")
    assert list(files) == ["e", "f", "a"]
    assert [path.name for path in files.values()] == ["08.png", "10.png", "00.png"]  # glossy, on white
    records = [json.loads(line) for line in (tmp_path / "out/images/metadata.jsonl").read_text().splitlines()]
    assert [record["objects"] for record in records] == [["e"], ["f"], ["a"]]
    assert all(path.is_file() for path in files.values())


def test_table_holds_losses_and_shares_of_every_variant(tmp_path: Path) -> None:
    with (tmp_path / "scalars.csv").open("w", newline="") as file:
        rows = [("step", "name", "value"), (10, "loss", 5.0), (10, "held_loss", 6.0), (20, "held_loss", 4.5)]
        csv.writer(file).writerows(rows)
    assert ablation.read_curve(tmp_path) == [(10.0, 6.0), (20.0, 4.5)]
    one = {source: {"1.5": 0.25} for source in ablation.SOURCES}
    swept = {source: {"1": 0.1, "1.5": 0.5} for source in ablation.SOURCES} | {"images": {"1.5": 0.75}}
    report = {
        "guidance": 1.5,
        "variants": {
            "base": {"held_loss": 4.5, "recognised": swept},
            "noise 0": {"held_loss": 4.0, "recognised": one},
        },
    }
    lines = ablation.to_markdown(report).splitlines()
    assert "| base | 4.500 | 75% | 50% | 50% |" in lines and "| noise 0 | 4.000 | 25% | 25% | 25% |" in lines
    assert "| base, guidance | 1 | 1.5 |" in lines and "| index | 10% | 50% |" in lines
    assert not any("noise 0, guidance" in line for line in lines)
