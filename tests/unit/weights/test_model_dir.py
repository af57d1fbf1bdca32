"""Folders of weights: what is written comes back, and nothing damaged, missing or foreign gets in."""

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
from clipgen.errors import WeightsError
from clipgen.models.clip import Clip
from clipgen.models.gpt import GPT
from clipgen.models.vqgan import VQGAN
from clipgen.weights import model_dir as weights
from clipgen.weights.model_dir import FILES, MANIFEST, build, load_weights, save_weights


@pytest.fixture
def folder(tiny_weights: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_weights, tmp_path / "copy"))


def test_what_is_saved_comes_back(tiny_weights: Path, tiny_config: ModelConfig, tmp_path: Path) -> None:
    config, parts = load_weights(tiny_weights)
    assert config == tiny_config
    again, same = load_weights(save_weights(tmp_path / "again", config, parts))
    assert again == config
    for part, tensors in parts.items():
        assert tensors.keys() == same[part].keys()
        assert all(torch.equal(tensor, same[part][name]) for name, tensor in tensors.items())


def test_a_folder_makes_a_working_model(tiny_weights: Path) -> None:
    config, parts = load_weights(tiny_weights)
    clip = Clip.from_state_dict(parts["clip"])
    gpt, vqgan = build(GPT, config.gpt, parts["gpt"]), build(VQGAN, config.vqgan, parts["vqgan"])
    logits = gpt(torch.zeros(1, 15, dtype=torch.long), clip.encode_text(["a lemon"]))
    assert vqgan.decode_tokens(logits.argmax(-1)).shape == (1, 3, 32, 32)


def test_build_freezes_and_converts(tiny_weights: Path) -> None:
    config, parts = load_weights(tiny_weights)
    gpt = build(GPT, config.gpt, parts["gpt"], dtype=torch.bfloat16)
    assert not gpt.training
    assert {p.dtype for p in gpt.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad or p.is_meta for p in gpt.parameters())


def test_build_does_not_copy(tiny_weights: Path) -> None:
    config, parts = load_weights(tiny_weights)
    gpt = build(GPT, config.gpt, parts["gpt"])
    assert gpt.head.weight.data_ptr() == parts["gpt"]["head.weight"].data_ptr()


def test_half_precision_on_disk(tiny_weights: Path, tmp_path: Path) -> None:
    config, parts = load_weights(tiny_weights)
    half = save_weights(tmp_path / "half", config, parts, dtype=torch.float16)
    assert (half / "gpt.safetensors").stat().st_size < 0.6 * (tiny_weights / "gpt.safetensors").stat().st_size
    stored = load_weights(half)[1]["gpt"]["head.weight"]
    assert stored.dtype == torch.float16
    torch.testing.assert_close(stored.float(), parts["gpt"]["head.weight"], rtol=1e-3, atol=1e-6)


def test_others_may_read_what_is_written(tiny_weights: Path) -> None:
    modes = {(tiny_weights / file).stat().st_mode for file in FILES}
    assert len(modes) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_what_cannot_be_stored_leaves_the_old_weights_alone(folder: Path, value: float) -> None:
    config, parts = load_weights(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    bad = parts | {"gpt": parts["gpt"] | {"norm.weight": torch.tensor([1.0, value])}}
    with pytest.raises(WeightsError, match=r"gpt: norm\.weight holds NaN or infinity"):
        save_weights(folder, config, bad, dtype=torch.float16)  # 1e6 overflows
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_interrupted_save_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, parts = load_weights(folder)
    parts["vqgan"] = {name: tensor + 1 for name, tensor in parts["vqgan"].items()}
    replace, calls = weights.os.replace, []

    def crash_before_the_manifest(source: Path, target: Path) -> None:
        if target.name == MANIFEST:
            raise KeyboardInterrupt
        calls.append(target.name)
        replace(source, target)

    monkeypatch.setattr(weights.os, "replace", crash_before_the_manifest)
    with pytest.raises(KeyboardInterrupt):
        save_weights(folder, config, parts)
    assert calls == list(FILES)
    with pytest.raises(WeightsError, match=r"vqgan\.safetensors is damaged or was changed"):
        load_weights(folder)


def test_other_files_stay(folder: Path) -> None:
    (folder / "README.md").write_text("the model card")
    save_weights(folder, *load_weights(folder))
    assert (folder / "README.md").read_text() == "the model card"
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, MANIFEST, "README.md"])


def test_the_parts_must_be_the_three(tiny_config: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="give exactly clip, vqgan, gpt"):
        save_weights(tmp_path / "new", tiny_config, {"gpt": {}})
    assert not (tmp_path / "new").exists()


# --- damage ---


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(WeightsError, match=f"{name} is missing; fetch the folder again"):
        load_weights(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named(folder: Path, name: str) -> None:
    size = (folder / name).stat().st_size
    with (folder / name).open("r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(WeightsError, match=f"{name} has {size - 1:,} bytes; {size:,} were expected"):
        load_weights(folder)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_flipped_bit_is_found(folder: Path, data: st.DataObject) -> None:
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
            load_weights(folder)
    finally:
        with path.open("r+b") as file:
            file.seek(position)
            file.write(bytes([old]))


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no such folder; give one that holds config\.yaml"):
        load_weights(tmp_path / "nowhere")


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
def test_a_bad_manifest(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(WeightsError, match=r"manifest\.json is no manifest of weights"):
        load_weights(folder)


def test_a_manifest_from_the_future(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"version": 2}))
    with pytest.raises(WeightsError, match="has the version 2; this clipgen reads version 1"):
        load_weights(folder)


def sign(folder: Path) -> None:
    """Make the manifest agree with files that a test has changed."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = {file: weights._fingerprint(folder / file) for file in FILES}
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("gpt.safetensors", b"PK\x03\x04 a pickle, say", r"gpt\.safetensors is no safetensors file"),
        ("gpt.safetensors", b"", r"gpt\.safetensors is no safetensors file"),
        ("config.yaml", b"gpt: {n_head: 7}", r"config\.yaml: gpt\.n_embd 1024 is not divisible by n_head 7"),
        ("config.yaml", b"\xff\xfe\x00", r"config\.yaml"),
    ],
)
def test_signed_but_unusable(folder: Path, file: str, content: bytes, message: str) -> None:
    (folder / file).write_bytes(content)
    sign(folder)
    with pytest.raises(WeightsError, match=message):
        load_weights(folder)


def test_a_clip_of_another_width(folder: Path) -> None:
    tensors = load_file(folder / "clip.safetensors")
    tensors["text_projection"] = torch.zeros(64, 48)
    save_file(tensors, folder / "clip.safetensors")
    sign(folder)
    with pytest.raises(WeightsError, match=r"embeddings of 48 numbers, but gpt\.n_cond in config\.yaml is 32"):
        load_weights(folder)


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
    ],
)
def test_tensors_that_do_not_fit(tiny_weights: Path, change: Callable[[dict], object], message: str) -> None:
    config, parts = load_weights(tiny_weights)
    change(parts["gpt"])
    with pytest.raises(WeightsError, match=message):
        build(GPT, config.gpt, parts["gpt"])
