"""Folders of weights: saved models load unchanged, and damaged, missing or foreign files are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from clipgen.config import ModelConfig
from clipgen.errors import ConfigError, WeightsError
from clipgen.models.clip import Clip
from clipgen.models.gpt import GPT
from clipgen.models.vqgan import VQGAN
from clipgen.weights import model_dir as weights
from clipgen.weights.model_dir import FILES, MANIFEST, build_module, load_model_dir, save_model_dir


@pytest.fixture
def folder(tiny_weights: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to damage."""
    return Path(shutil.copytree(tiny_weights, tmp_path / "copy"))


def test_saved_model_loads_unchanged(tiny_weights: Path, tiny_config: ModelConfig, tmp_path: Path) -> None:
    config, parts = load_model_dir(tiny_weights)
    assert config == tiny_config
    again, same = load_model_dir(save_model_dir(tmp_path / "again", config, parts))
    assert again == config
    for part, tensors in parts.items():
        assert tensors.keys() == same[part].keys()
        assert all(torch.equal(tensor, same[part][name]) for name, tensor in tensors.items())


def test_loaded_parts_make_a_working_model(tiny_weights: Path) -> None:
    config, parts = load_model_dir(tiny_weights)
    clip = Clip.from_state_dict(parts["clip"])
    gpt, vqgan = build_module(GPT, config.gpt, parts["gpt"]), build_module(VQGAN, config.vqgan, parts["vqgan"])
    logits = gpt(torch.zeros(1, 15, dtype=torch.long), clip.encode_text(["a lemon"]))
    assert vqgan.decode_tokens(logits.argmax(-1)).shape == (1, 3, 32, 32)


def test_built_module_is_frozen_and_in_the_asked_precision(tiny_weights: Path) -> None:
    config, parts = load_model_dir(tiny_weights)
    gpt = build_module(GPT, config.gpt, parts["gpt"], dtype=torch.bfloat16)
    assert not gpt.training
    assert {p.dtype for p in gpt.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad or p.is_meta for p in gpt.parameters())


def test_built_module_takes_over_the_tensors_without_a_copy(tiny_weights: Path) -> None:
    config, parts = load_model_dir(tiny_weights)
    gpt = build_module(GPT, config.gpt, parts["gpt"])
    assert gpt.head.weight.data_ptr() == parts["gpt"]["head.weight"].data_ptr()


def test_written_files_are_all_readable_by_the_same_users(tiny_weights: Path) -> None:
    modes = {(tiny_weights / file).stat().st_mode for file in FILES}
    assert len(modes) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_weights_with_nan_or_overflow_are_refused_and_the_old_ones_stay(folder: Path, value: float) -> None:
    config, parts = load_model_dir(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    bad = parts | {"gpt": parts["gpt"] | {"norm.weight": torch.tensor([1.0, value]).half()}}
    with pytest.raises(WeightsError, match=r"gpt: norm\.weight holds NaN or infinity"):
        save_model_dir(folder, config, bad)  # 1e6 overflows
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_interrupted_save_is_refused_at_load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, parts = load_model_dir(folder)
    parts["vqgan"] = {name: tensor + 1 for name, tensor in parts["vqgan"].items()}
    replace, calls = weights.os.replace, []

    def crash_before_the_manifest(source: Path, target: Path) -> None:
        if target.name == MANIFEST:
            raise KeyboardInterrupt
        calls.append(target.name)
        replace(source, target)

    monkeypatch.setattr(weights.os, "replace", crash_before_the_manifest)
    with pytest.raises(KeyboardInterrupt):
        save_model_dir(folder, config, parts)
    assert calls == list(FILES)
    with pytest.raises(WeightsError, match=r"vqgan\.safetensors is damaged or was changed"):
        load_model_dir(folder)


def test_saving_keeps_other_files_of_the_folder(folder: Path) -> None:
    (folder / "README.md").write_text("the model card")
    save_model_dir(folder, *load_model_dir(folder))
    assert (folder / "README.md").read_text() == "the model card"
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, MANIFEST, "README.md"])


def test_saving_without_all_three_parts_is_refused(tiny_config: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="give exactly clip, vqgan, gpt"):
        save_model_dir(tmp_path / "new", tiny_config, {"gpt": {}})
    assert not (tmp_path / "new").exists()


# --- damage ---


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(WeightsError, match=f"{name} is missing; fetch the folder again"):
        load_model_dir(folder)


@pytest.mark.parametrize("name", FILES)
def test_truncated_file_is_named(folder: Path, name: str) -> None:
    size = (folder / name).stat().st_size
    with (folder / name).open("r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(WeightsError, match=f"{name} has {size - 1:,} bytes; {size:,} were expected"):
        load_model_dir(folder)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_flipped_bit_is_detected(folder: Path, data: st.DataObject) -> None:
    path = folder / data.draw(st.sampled_from(FILES))
    position = data.draw(st.integers(0, path.stat().st_size - 1))
    flip = 1 << data.draw(st.integers(0, 7))
    with path.open("r+b") as file:
        file.seek(position)
        old = file.read(1)[0]
        file.seek(position)
        file.write(bytes([old ^ flip]))
    try:
        with pytest.raises(WeightsError, match=f"{path.name} is damaged or was changed"):
            load_model_dir(folder)
    finally:
        with path.open("r+b") as file:
            file.seek(position)
            file.write(bytes([old]))


def test_missing_folder_is_refused_with_the_files_it_needs(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no such folder; give one that holds config\.yaml"):
        load_model_dir(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        '{"version": 1}',
        '{"version": 1, "files": []}',
        '{"version": 1, "files": {}}',
        "[" * 10**5,
    ],
)
def test_unreadable_manifest_is_refused(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(WeightsError, match=r"manifest\.json is not a manifest of weights"):
        load_model_dir(folder)


def test_manifest_of_a_newer_version_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"version": 2}))
    with pytest.raises(WeightsError, match="has the version 2; this clipgen reads version 1"):
        load_model_dir(folder)


def sign(folder: Path) -> None:
    """Make the manifest agree with files that a test has changed."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = {file: weights.fingerprint(folder / file) for file in FILES}
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("gpt.safetensors", b"PK\x03\x04 a pickle, say", r"gpt\.safetensors is a PyTorch checkpoint"),
        ("gpt.safetensors", b"", r"gpt\.safetensors is empty"),
        ("config.yaml", b"gpt: {n_head: 7}", r"config\.yaml: gpt\.n_embd 1024 is not divisible by n_head 7"),
        ("config.yaml", b"\xff\xfe\x00", r"config\.yaml"),
    ],
)
def test_unusable_file_that_matches_its_manifest_is_named(
    folder: Path, file: str, content: bytes, message: str
) -> None:
    (folder / file).write_bytes(content)
    sign(folder)
    with pytest.raises(ConfigError if file == "config.yaml" else WeightsError, match=message):
        load_model_dir(folder)


def test_clip_of_another_embedding_size_is_refused(folder: Path) -> None:
    tensors = load_file(folder / "clip.safetensors")
    tensors["text_projection"] = torch.zeros(64, 48)
    save_file(tensors, folder / "clip.safetensors")
    sign(folder)
    with pytest.raises(WeightsError, match=r"embeddings of 48 numbers, but gpt\.n_cond in config\.yaml is 32"):
        load_model_dir(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("head.bias"), r"the GPT's tensors do not fit\. 1 missing: head\.bias"),
        (lambda w: w.update({"head.extra": torch.zeros(1)}), r"1 unexpected: head\.extra"),
        (
            lambda w: w.update({"head.bias": torch.zeros(63)}),
            r"head\.bias has the shape \(63,\); \(64,\) was expected\. Use the configuration",
        ),
        (lambda w: w.clear(), r"missing: .* and \d+ more"),
        (
            lambda w: w.update({"head.bias": torch.zeros(64, dtype=torch.int8)}),
            r"GPT: head\.bias holds torch\.int8; it must be floating-point",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_network_are_named(
    tiny_weights: Path, change: Callable[[dict], object], message: str
) -> None:
    config, parts = load_model_dir(tiny_weights)
    change(parts["gpt"])
    with pytest.raises(WeightsError, match=message):
        build_module(GPT, config.gpt, parts["gpt"])
