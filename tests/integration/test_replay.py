"""`clipgen replay`: the same image from its receipt alone, or what differs and why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from cli_kit import Run
from PIL import Image
from safetensors.torch import load_file

from clipgen.config import ModelConfig
from clipgen.outputs.metadata import Receipt
from clipgen.weights.model_dir import PARTS, save_model_dir


def draw(run: Run, *args: object) -> list[str]:
    few = ("--num-outputs", 2, "--candidates", 4, "--seed", 7, "--device", "cpu", "--dtype", "float32", "--json")
    result = run("generate", *args, *few)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["files"]


def test_replay_of_a_png_matches(run: Run) -> None:
    for file in draw(run, "a lemon", "--mix", "a dog=-0.5"):
        result = run("replay", file)
        assert result.exit_code == 0, result.output
        assert "a lemon + a dog (-0.5): seed" in result.stdout
        assert "every pixel matches" in result.stdout or "up to rounding" in result.stdout


def test_replay_json_and_save_hold_the_regenerated_image(run: Run) -> None:
    file = draw(run, "a lemon")[1]
    result = run("replay", file, "--json", "--save", "again.png")
    record = json.loads(result.stdout)
    assert result.exit_code == 0 and record["same"] and record["difference"]["most"] <= 1 and record["changed"] == {}
    assert record["receipt"]["image_seed"] == Receipt.from_file("again.png").image_seed
    assert Receipt.from_file("again.png").candidates == 1


@pytest.mark.parametrize("suffix", ["webp", "jpg"])
def test_replay_of_a_lossy_file_reports_the_difference(run: Run, suffix: str) -> None:
    (file, _) = draw(run, "a lemon", "--format", suffix)
    result = run("replay", file, "--json")
    record = json.loads(result.stdout)
    assert not record["lossless"] and 0 < record["difference"]["mean"] <= record["difference"]["most"]
    assert "mean difference" in run("replay", file).stdout
    renamed = Path(file).rename("picture.png")  # its contents count
    assert not json.loads(run("replay", renamed, "--json").stdout)["lossless"]


def test_replay_of_an_edited_image_differs(run: Run) -> None:
    (file, _) = draw(run, "a lemon")
    receipt = Receipt.from_file(file)
    from clipgen.images.pixels import load_image, save_image

    image = load_image(file)
    image.paste((255, 0, 0), (0, 0, 8, 8))
    save_image(image, file, metadata=receipt.to_metadata())
    result = run("replay", file)
    assert result.exit_code == 1 and "different" in result.stdout and "edited" in result.stdout
    save_image(Image.new("RGB", (9, 9)), file, metadata=receipt.to_metadata())
    result = run("replay", file)
    assert result.exit_code == 1 and "sizes" in result.stdout


def test_replay_with_other_weights_names_them(
    run: Run, tiny_weights: Path, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    (file, _) = draw(run, "a lemon")
    parts = {part: load_file(tiny_weights / f"{part}.safetensors") for part in PARTS}
    parts["gpt"]["head.weight"] = parts["gpt"]["head.weight"].flip(0)
    other = save_model_dir(tmp_path / "other", tiny_config, parts)
    result = run("replay", file, "--weights", other)
    assert result.exit_code == 1 and "weights:" in result.stdout and "edited" not in result.stdout


def test_replay_in_another_precision_names_it(run: Run) -> None:
    (file, _) = draw(run, "a lemon")
    result = run("replay", file, "--dtype", "int8")
    assert result.exit_code in (0, 1) and "precision: float32 then, int8 now" in result.stdout


@pytest.mark.parametrize(("dtype", "device"), [("float16", "cuda NVIDIA H200"), ("bfloat16", "mps")])
def test_replay_of_an_image_from_a_missing_device_names_it(run: Run, dtype: str, device: str) -> None:
    from dataclasses import replace

    from clipgen.images.pixels import load_image, save_image

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    (file, _) = draw(run, "a lemon")
    receipt = replace(Receipt.from_file(file), dtype=dtype, device=device)
    save_image(load_image(file), file, metadata=receipt.to_metadata())
    result = run("replay", file)
    assert result.exit_code in (0, 1) and f"device: {device} then" in result.stdout


def test_replay_of_an_image_prompt_needs_the_image(run: Run, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.linear_gradient("L").convert("RGB").save(photo)
    (file, _) = draw(run, "--image", photo)
    result = run("replay", file)
    assert result.exit_code == 2 and "photo.png" in result.stderr and result.stdout == ""
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "other.png")
    assert run("replay", file, "--image", tmp_path / "other.png").exit_code == 2
    copy = shutil.copy(photo, tmp_path / "moved.png")
    assert run("replay", file, "--image", tmp_path / "other.png", "--image", copy).exit_code == 0


def test_file_that_cannot_be_replayed_is_refused_with_its_reason(run: Run, tmp_path: Path) -> None:
    draw(run, "a lemon")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("a lemon")
    for file, words in [
        ("plain.png", "no receipt"),
        ("text.png", "not an image"),
        ("missing.png", "no such file"),
        ("outputs/a-lemon-7-grid.png", "holds 2 images"),
    ]:
        result = run("replay", file)
        assert result.exit_code == 2 and words in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr
