"""train/encode.py: shards are complete or absent, those of other networks are refused, and stage 2 learns the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from training_kit import run, same_weights, scalars, write_config, write_images

from clipgen.config import ModelConfig
from train import encode, stage2
from train.loop.batches import split_held_out


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def config(tiny_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tiny_config, tmp_path_factory.mktemp("config") / "tiny.yaml")


@pytest.fixture
def flags(images: Path, config: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    monkeypatch.setattr(encode, "ROWS", 20)  # 50 crops in three shards
    monkeypatch.setattr(encode, "BATCH", 8)
    parts = ["--vqgan", tiny_weights, "--clip", tiny_weights / "clip.safetensors"]
    return ["--config", config, *parts, "--data", images]


def test_only_missing_shards_are_encoded_again(flags, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "encoded"
    run(encode, monkeypatch, *flags, "--out", out)
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) == [
        *(f"00000{n}.safetensors" for n in range(3)),
        "index.json",
        "skipped.txt",
    ]
    first = encode.Encoded(out)
    assert len(first) == 50 and (first.num_images, first.views) == (25, 2)
    everything = first.read(range(50))
    assert everything[0].shape == (50, 16) and everything[1].norm(dim=1).sub(1).abs().max() < 1e-2
    assert not torch.equal(everything[0][:25], everything[0][25:])  # another crop
    (out / "000001.safetensors").unlink()
    kept = (out / "000002.safetensors").stat().st_mtime_ns
    run(encode, monkeypatch, *flags, "--out", out)
    assert all(torch.equal(a, b) for a, b in zip(encode.Encoded(out).read(range(50)), everything, strict=True))
    assert (out / "000002.safetensors").stat().st_mtime_ns == kept
    some = encode.Encoded(out).read([41, 3, 20])
    assert torch.equal(some[0], everything[0][[41, 3, 20]]) and torch.equal(some[1], everything[1][[41, 3, 20]])


@pytest.fixture
def turned(images: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two folders of the same names, without the file that cannot be read: images, and the same upside down."""
    data, seen = tmp_path / "data", tmp_path / "seen"
    for folder in (data, seen):
        folder.mkdir()
    for path in images.rglob("*.png"):
        shutil.copy(path, data)
        Image.open(path).rotate(180).save(seen / path.name)
    return data, seen


def test_seen_images_give_the_embeddings_and_data_gives_the_tokens(
    flags: list[object], turned: tuple[Path, Path], tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / name for name in ("plain", "turned", "both")]
    (data, seen), name = turned, min(path.name for path in turned[0].iterdir())
    *flags, _ = flags
    run(encode, monkeypatch, *flags, data, "--out", folders[0])
    run(encode, monkeypatch, *flags, seen, "--out", folders[1])
    run(encode, monkeypatch, *flags, data, "--seen", seen, "--out", folders[2])
    (tokens, _), (_, embeddings), both = (encode.Encoded(folder).read(range(10)) for folder in folders)
    assert torch.equal(both[0], tokens) and torch.equal(both[1], embeddings)

    def refused(out: Path) -> str:
        with pytest.raises(SystemExit) as stop:
            run(encode, monkeypatch, *flags, data, "--seen", seen, "--out", out)
        assert stop.value.code == 2
        return capsys.readouterr().err

    (seen / name).write_bytes(b"no image")
    assert name in refused(tmp_path / "broken")
    (seen / name).unlink()
    assert "does not hold the same names" in refused(tmp_path / "fewer")


def test_stage2_learns_the_same_from_seen_images_once_encoded_as_from_pixels(
    flags: list[object], turned: tuple[Path, Path], tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (data, seen), common = turned, ["stage2.neighbours=0"]
    *flags, _ = flags
    pixels = ["stage2.from_pixels=true", "stage2.workers=1"]
    run(encode, monkeypatch, *flags, data, "--seen", seen, "--out", tmp_path / "set")
    run(stage2, monkeypatch, *flags, tmp_path / "set", "--out", tmp_path / "once", *common)
    run(stage2, monkeypatch, *flags, data, "--seen", seen, "--out", tmp_path / "pixels", *common, *pixels)
    run(stage2, monkeypatch, *flags, data, "--out", tmp_path / "plain", *common, *pixels)
    once, both, plain = (scalars(tmp_path / name) for name in ("once", "pixels", "plain"))
    losses = [key for key in once if "loss" in key[1]]
    assert losses and all(both[key] == pytest.approx(once[key], abs=1e-4) for key in losses)
    assert any(plain[key] != pytest.approx(once[key], abs=1e-4) for key in losses)
    with pytest.raises(SystemExit) as stop:
        run(stage2, monkeypatch, *flags, tmp_path / "set", "--seen", seen, "--out", tmp_path / "again")
    assert stop.value.code == 2 and "give --seen" in capsys.readouterr().err


def test_interrupted_set_is_refused_until_it_is_completed(flags, tmp_path: Path, monkeypatch, capsys) -> None:
    out, written = tmp_path / "encoded", []

    def save(tensors: dict, path: Path) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        encode_save(tensors, path)

    encode_save = encode.save_tensors
    monkeypatch.setattr(encode, "save_tensors", save)
    with pytest.raises(SystemExit) as stop:
        run(encode, monkeypatch, *flags, "--out", out)
    assert stop.value.code == 130 and "the same command continues" in capsys.readouterr().err
    with pytest.raises(encode.DataError, match="not complete"):
        encode.Encoded(out)
    monkeypatch.setattr(encode, "save_tensors", encode_save)
    run(encode, monkeypatch, *flags, "--out", out)
    assert len(encode.Encoded(out)) == 50


@pytest.mark.parametrize("changed", ["vqgan", "images", "views"])
def test_set_of_another_vqgan_images_or_views_is_refused(
    changed: str, flags, tiny_weights: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    out = tmp_path / "encoded"
    run(encode, monkeypatch, *flags, "--out", out)
    if changed == "vqgan":
        flags[3] = shutil.copytree(tiny_weights, tmp_path / "other")
        weights = load_file(tmp_path / "other" / "vqgan.safetensors")
        weights["quantizer.embedding.weight"] += 1
        encode.save_tensors(weights, tmp_path / "other" / "vqgan.safetensors")
    elif changed == "images":
        flags[-1] = shutil.copytree(flags[-1], tmp_path / "more")
        run(encode, monkeypatch, *flags, "--out", out)  # the same images in another place
        shutil.copy(tmp_path / "more" / "0" / "03.png", tmp_path / "more" / "0" / "00.png")
    more = ["stage2.views=1"] if changed == "views" else []
    with pytest.raises(SystemExit) as stop:
        run(encode, monkeypatch, *flags, "--out", out, *more)
    expected = "views (2, not 1)" if changed == "views" else changed
    assert stop.value.code == 2 and f"was encoded with another {expected}" in capsys.readouterr().err
    if changed == "vqgan":  # stage 2 on the set itself
        flags[-1] = out
        with pytest.raises(SystemExit):
            run(stage2, monkeypatch, *flags, "--out", tmp_path / "gpt")
        assert "was encoded with another vqgan" in capsys.readouterr().err


def test_stage2_learns_the_same_from_an_encoded_set_as_from_pixels(flags, tmp_path: Path, monkeypatch) -> None:
    common = ["stage2.neighbours=0"]
    run(stage2, monkeypatch, *flags, "--out", tmp_path / "once", *common)
    assert json.loads((tmp_path / "once" / "encoded" / "index.json").read_text())["complete"]
    run(
        stage2,
        monkeypatch,
        *flags,
        "--out",
        tmp_path / "pixels",
        *common,
        "stage2.from_pixels=true",
        "stage2.workers=1",
    )
    assert not (tmp_path / "pixels" / "encoded").exists()
    run(stage2, monkeypatch, *flags[:-1], tmp_path / "once" / "encoded", "--out", tmp_path / "set", *common)
    assert same_weights(tmp_path / "once" / "gpt.safetensors", tmp_path / "set" / "gpt.safetensors")
    once, pixels = scalars(tmp_path / "once"), scalars(tmp_path / "pixels")
    losses = [key for key in once if "loss" in key[1]]
    assert len(losses) == 8 and all(pixels[key] == pytest.approx(once[key], abs=1e-4) for key in losses)
    assert (tmp_path / "pixels" / "skipped.txt").is_file()


def test_neighbours_with_from_pixels_are_refused(flags, tmp_path: Path, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        run(stage2, monkeypatch, *flags, "--out", tmp_path / "gpt", "stage2.from_pixels=true")
    assert stop.value.code == 2 and "neighbours is 2" in capsys.readouterr().err


def test_crop_rows_contain_no_held_out_image() -> None:
    trained, held_out = split_held_out(100, 512)
    rows = stage2.crop_rows(trained, 100, 3)
    assert len(held_out) == 5 and len(rows) == 285 and rows.max() < 300
    assert not set((rows % 100).tolist()) & set(held_out.tolist())


@pytest.mark.parametrize("text", ["", '{"origin": ', "[]", '{"complete": true}', '{"origin": {"settings": null}}'])
def test_damaged_index_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(text)
    for read in (encode.Encoded, lambda folder: encode.check_origin(folder / "index.json", {})):
        with pytest.raises(encode.DataError, match=r"index\.json is damaged or not the index of an encoded set"):
            read(tmp_path)


def test_unreadable_images_of_an_interrupted_encoding_are_listed_by_the_next_one(
    flags, tmp_path: Path, monkeypatch
) -> None:
    out, save = tmp_path / "encoded", encode.save_tensors

    def save_but_the_last(weights, path: Path) -> None:
        if path.name == "000002.safetensors":
            raise KeyboardInterrupt
        save(weights, path)

    monkeypatch.setattr(encode, "save_tensors", save_but_the_last)
    with pytest.raises(SystemExit):
        run(encode, monkeypatch, *flags, "--out", out)
    monkeypatch.setattr(encode, "save_tensors", save)
    assert not (out / "000002.safetensors").exists() and (out / "000001.safetensors").exists()
    first = (out / "skipped.txt").read_text()
    run(encode, monkeypatch, *flags, "--out", out)
    assert "broken.jpg: is not an image" in first and (out / "skipped.txt").read_text() == first


def test_budget_of_minutes_ends_an_encoding_between_shards(flags, tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "gpt"
    with pytest.raises(SystemExit) as stop:
        run(stage2, monkeypatch, *flags, "--out", out, "--minutes", "1e-9")
    assert stop.value.code == 0 and "its budget of 1e-09 minutes: 3 shards of" in capsys.readouterr().out
    assert not list((out / "encoded").glob("*.safetensors"))
    run(stage2, monkeypatch, *flags, "--out", out)
    assert (out / "gpt.safetensors").is_file()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["stage2.init=nowhere.safetensors"], "nowhere.safetensors"),
        (["stage2.optimizer=adamw", "stage2.parallel=fsdp"], "start it with torchrun"),
        (["stage2.clip_weight=0.2", "stage2.clip_batch=1", "stage2.accumulate=2"], "clip_batch is 1"),
    ],
)
def test_mistakes_are_refused_before_the_images_are_encoded(
    settings: list[str], said: str, flags, tmp_path: Path, monkeypatch, capsys
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(stage2, monkeypatch, *flags, "--out", tmp_path / "gpt", *settings)
    assert stop.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "gpt" / "encoded").exists()


def test_training_is_not_resumed_with_another_vqgan(
    flags, tiny_weights: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    pixels = ["stage2.from_pixels=true", "stage2.neighbours=0"]
    run(stage2, monkeypatch, *flags, "--out", tmp_path / "gpt", *pixels, "stage2.steps=2")
    other = load_file(tiny_weights / "vqgan.safetensors")
    other["quantizer.embedding.weight"] = -other["quantizer.embedding.weight"]
    (tmp_path / "vqgan").mkdir()
    save_file(other, tmp_path / "vqgan" / "vqgan.safetensors")
    with pytest.raises(SystemExit):
        run(stage2, monkeypatch, *flags, "--vqgan", tmp_path / "vqgan", "--out", tmp_path / "gpt", *pixels)
    assert "was trained with vqgan " in capsys.readouterr().err
