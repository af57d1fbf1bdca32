"""Published checkpoints: every tensor is used, results agree with the originals, nothing is dropped silently."""

from __future__ import annotations

import json
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_kit import teacher_forced
from omegaconf import OmegaConf
from published import TAMING as TAMING_CONFIG
from published import Source, hfailab_names, original, tiny_clip, written
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipgen import ClipGen
from clipgen.config import GPTConfig, ModelConfig, VQGANConfig
from clipgen.errors import ConfigError, WeightsError
from clipgen.models.capabilities import cpu_dtypes
from clipgen.models.clip import Clip
from clipgen.models.gpt import GPT
from clipgen.models.vqgan import VQGAN
from clipgen.weights.checkpoint_reader import read_tensors
from clipgen.weights.convert import convert_checkpoints, map_gpt, map_vqgan
from clipgen.weights.describe import describe_model_dir
from clipgen.weights.model_dir import load_model_dir
from train.config import load_config

CLOSE = {"rtol": 0.0, "atol": 1e-4}
LIGHTNING = "pytorch_lightning.callbacks.model_checkpoint"
HFAILAB = "hfailab_v0.1.0_state_dicts.json"
TAMING = "taming_vqgan_imagenet_f16_16384_state_dict.json"
Map = Callable[[dict[str, Tensor], Any], dict[str, Tensor]]


def meta(entries: dict[str, Any]) -> dict[str, Tensor]:
    return {n: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for n, (shape, dtype) in entries.items()}


def published(golden: Path, which: str) -> dict[str, Tensor]:
    if which == "taming":
        return meta(json.loads((golden / TAMING).read_text()))
    return meta(json.loads((golden / HFAILAB).read_text())[which])


COCO, IMAGENET = load_config("coco").model, load_config("imagenet").model
CASES = [  # listing, function, network, configuration, what is training state, one name to tamper with
    ("vqgan", map_vqgan, VQGAN, COCO.vqgan, "discriminator.", "encoder.final.0.weight"),
    ("taming", map_vqgan, VQGAN, IMAGENET.vqgan, "loss.", "encoder.mid.attn_1.q.weight"),
    ("gpt2_medium", map_gpt, GPT, COCO.gpt, "mask", "blocks.23.encoder.norm2.bias"),
    ("gpt2_large", map_gpt, GPT, GPTConfig(n_layer=36, n_head=20, n_embd=1280), "mask", "pos_emb"),
]
cases = pytest.mark.parametrize(
    ("which", "convert", "kind", "config", "state", "name"), CASES, ids=[c[0] for c in CASES]
)


@cases
def test_every_published_tensor_is_used_exactly_once(
    golden: Path, which: str, convert: Map, kind: type[VQGAN | GPT], config: Any, state: str, name: str
) -> None:
    theirs = published(golden, which)
    ours = convert(theirs, config)
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in kind(config).state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.items()} == expected
    # Not one number is lost or used twice.
    weights = sum(tensor.numel() for name, tensor in theirs.items() if state not in name)
    assert sum(tensor.numel() for tensor in ours.values()) == weights


@cases
def test_missing_unexpected_and_misshaped_tensors_are_named(
    golden: Path, which: str, convert: Map, kind: type[VQGAN | GPT], config: Any, state: str, name: str
) -> None:
    theirs = published(golden, which)
    with pytest.raises(WeightsError, match=f"1 missing: {name}"):
        convert({n: t for n, t in theirs.items() if n != name}, config)
    with pytest.raises(WeightsError, match=r"1 unexpected: optimizer\.step"):
        convert(theirs | {"optimizer.step": torch.zeros(())}, config)
    with pytest.raises(WeightsError, match=rf"{name} has the shape \(3,\)"):
        convert(theirs | {name: torch.zeros(3)}, config)


def test_state_dict_of_another_size_is_refused(golden: Path) -> None:
    with pytest.raises(WeightsError, match="HFAiLab GPT's"):
        map_gpt(published(golden, "gpt2_large"), COCO.gpt)
    with pytest.raises(WeightsError, match="CompVis VQGAN's"):
        map_vqgan(published(golden, "taming"), replace(IMAGENET.vqgan, ch=64))
    with pytest.raises(WeightsError, match="HFAiLab VQGAN's"):
        map_vqgan(published(golden, "vqgan"), replace(COCO.vqgan, ch=64))


def test_discriminator_of_a_lightning_checkpoint_is_left_out(golden: Path) -> None:
    theirs = published(golden, "taming")
    extra = {"loss.discriminator.main.0.weight": torch.zeros(1), "loss.logvar": torch.zeros(())}
    assert map_vqgan(theirs | extra, IMAGENET.vqgan).keys() == map_vqgan(theirs, IMAGENET.vqgan).keys()


# --- agreement with the original networks ---


def check_vqgan(vqgan: VQGAN, io: dict[str, Tensor]) -> None:
    latent = vqgan.encode(io["image"])
    torch.testing.assert_close(latent, io["latent"], **CLOSE)
    quantized, loss, indices = vqgan.quantizer(latent)
    assert torch.equal(indices, io["indices"].flatten(1))
    torch.testing.assert_close(loss, io["quant_loss"].squeeze(), **CLOSE)
    torch.testing.assert_close(quantized, io["quantized"], **CLOSE)
    torch.testing.assert_close(vqgan.decode_tokens(indices), io["reconstruction"], **CLOSE)


def check_clip(clip: Clip, io: dict[str, Tensor]) -> None:
    torch.testing.assert_close(clip.model.encode_text(io["text_tokens"].long()), io["text_embeds"], **CLOSE)
    torch.testing.assert_close(clip.model.encode_image(io["pixels"]), io["image_embeds"], **CLOSE)
    unit = torch.nn.functional.normalize(io["image_embeds"], dim=-1)
    torch.testing.assert_close(clip.encode_image(io["pixels"]), unit, **CLOSE)


def test_converted_hfailab_clip_and_vqgan_compute_as_the_originals(
    golden: Path, hfailab: Source, tmp_path: Path
) -> None:
    pipe = hfailab.convert(tmp_path / "out")
    check_clip(pipe.clip, original(golden, "hfailab_clip_tiny")[1])
    check_vqgan(pipe.vqgan, original(golden, "hfailab_vqgan_tiny")[1])
    assert pipe("a lemon", seed=0).images[0].size == (32, 32)


def test_converted_hfailab_gpt_computes_as_the_original(golden: Path, tmp_path: Path) -> None:
    gpt = GPTConfig(n_layer=3, n_head=4, n_embd=48, vocab_size=96, block_size=16, n_cond=24)
    vqgan = VQGANConfig(16, 1, 32, [1, 1, 1], 1, [], 32, 32, codebook_size=96)
    theirs, io = original(golden, "hfailab_gpt_tiny")
    clip = tiny_clip(24).state_dict()
    pipe = written(tmp_path, clip, hfailab_names(VQGAN(vqgan)), theirs, ModelConfig("tiny", vqgan, gpt)).convert(
        tmp_path / "out"
    )
    torch.testing.assert_close(teacher_forced(pipe.gpt, io["tokens"], io["embedding"]), io["logits"], **CLOSE)
    torch.testing.assert_close(pipe.gpt(io["tokens"], io["embedding"]), io["logits"], **CLOSE)


def forget_lightning() -> None:
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        del sys.modules[name]


@pytest.fixture
def lightning_class() -> Iterator[type]:
    """Lightning's callback, whose class its checkpoints mention; importable while they are written."""
    module = types.ModuleType(LIGHTNING)
    kind = type("ModelCheckpoint", (), {"__module__": LIGHTNING})
    vars(module)["ModelCheckpoint"] = kind
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules[LIGHTNING] = module
    yield kind
    forget_lightning()


def test_converted_compvis_vqgan_computes_as_the_original(
    golden: Path, hfailab: Source, tmp_path: Path, lightning_class: type
) -> None:
    theirs, io = original(golden, "taming_vqgan_tiny")
    theirs |= {"loss.discriminator.main.0.weight": torch.zeros(2), "loss.logvar": torch.zeros(())}
    callbacks = {lightning_class: {"best_model_score": torch.tensor(0.5), "best_model_path": "x.ckpt"}}
    hfailab.vqgan = tmp_path / "last.ckpt"
    torch.save({"epoch": 1, "callbacks": callbacks, "state_dict": theirs}, hfailab.vqgan)
    config = load_config(hfailab.config)
    config.model.vqgan = TAMING_CONFIG
    OmegaConf.save(OmegaConf.structured(config), hfailab.config)
    forget_lightning()  # whoever converts need not have it
    check_vqgan(hfailab.convert(tmp_path / "out").vqgan, io)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensors_of_an_openai_torchscript_archive_equal_those_of_torch_jit(
    golden: Path, hfailab: Source, torchscript: Path, tmp_path: Path
) -> None:
    hfailab.clip = torchscript
    check_clip(hfailab.convert(tmp_path / "out").clip, original(golden, "hfailab_clip_tiny")[1])
    program = torch.jit.load(str(torchscript)).state_dict()
    found = read_tensors(torchscript)
    assert found.keys() == program.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in program.items())


def test_converting_our_own_files_changes_nothing(hfailab: Source, tmp_path: Path) -> None:
    first = hfailab.convert(tmp_path / "out")
    files = [tmp_path / "out" / f"{part}.safetensors" for part in ("clip", "vqgan", "gpt")]
    again = convert_checkpoints(*files, tmp_path / "again", hfailab.config)
    assert all((again / file.name).read_bytes() == file.read_bytes() for file in files)
    assert first.config == load_model_dir(again)[0]


def test_conversion_keeps_the_stored_precision(hfailab: Source, tmp_path: Path) -> None:
    content = torch.load(hfailab.gpt)
    content["model"] = {n: t.half() if t.is_floating_point() else t for n, t in content["model"].items()}
    torch.save(content, hfailab.gpt)
    folder = convert_checkpoints(hfailab.clip, hfailab.vqgan, hfailab.gpt, tmp_path / "out", hfailab.config)
    assert {tensor.dtype for tensor in load_file(folder / "gpt.safetensors").values()} == {torch.float16}


def test_bfloat16_pixels_and_embeddings_stay_close_to_float32(golden: Path, hfailab: Source, tmp_path: Path) -> None:
    """Half precision moves pixels by less than one or two of 255 levels and hardly turns CLIP's embeddings."""
    hfailab.convert(tmp_path / "out")
    if "bfloat16" not in cpu_dtypes():
        pytest.skip("this CPU does not compute in bfloat16")
    half = ClipGen.from_pretrained(tmp_path / "out", device="cpu", dtype="bfloat16")
    io = original(golden, "hfailab_vqgan_tiny")[1]
    pixels = half.vqgan.decode_tokens(io["indices"].flatten(1)).float()
    drift = (pixels - io["reconstruction"]).abs()
    io = original(golden, "hfailab_clip_tiny")[1]
    cosine = torch.nn.functional.cosine_similarity(half.clip.encode_image(io["pixels"]), io["image_embeds"])
    print(f"pixels: mean {drift.mean():.4f}, largest {drift.max():.4f} of 2; CLIP cosine {cosine.min():.5f}")
    assert drift.mean() < 2 * 2 / 255 and cosine.min() > 0.999


# --- files that do not fit ---


def test_missing_file_or_configuration_is_named_and_nothing_is_written(hfailab: Source, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="nowhere cannot be read: it does not exist"):
        convert_checkpoints(tmp_path / "nowhere", hfailab.vqgan, hfailab.gpt, tmp_path / "out", hfailab.config)
    with pytest.raises(ConfigError, match="no configuration 'cocoa'"):
        convert_checkpoints(hfailab.clip, hfailab.vqgan, hfailab.gpt, tmp_path / "out", "cocoa")
    assert not (tmp_path / "out").exists()


def test_file_of_another_part_or_size_is_named(hfailab: Source, tmp_path: Path) -> None:
    for field in ("clip", "vqgan", "gpt"):
        other = hfailab.gpt if field == "vqgan" else hfailab.vqgan
        paths = {"clip": hfailab.clip, "vqgan": hfailab.vqgan, "gpt": hfailab.gpt, field: other}
        with pytest.raises(WeightsError, match=other.name):
            convert_checkpoints(**paths, out=tmp_path / "out", config=hfailab.config)
    with pytest.raises(WeightsError, match=r"gpt\.pt: the HFAiLab GPT's tensors do not fit"):
        convert_checkpoints(hfailab.clip, written_vqgan(tmp_path), hfailab.gpt, tmp_path / "out", "coco")


def written_vqgan(folder: Path) -> Path:
    """A VQGAN of the size of coco, without its weights."""
    path = folder / "zeros.safetensors"
    with torch.device("meta"):
        shapes = VQGAN(load_config("coco").model.vqgan).state_dict()
    save_file({name: torch.zeros(t.shape, dtype=torch.float8_e4m3fn) for name, t in shapes.items()}, path)
    return path


def test_clip_of_another_embedding_size_is_refused(hfailab: Source, tmp_path: Path) -> None:
    torch.save(tiny_clip(48).state_dict(), hfailab.clip)
    with pytest.raises(WeightsError, match=r"embeds in 48 dimensions, but gpt\.n_cond of .* is 32"):
        hfailab.convert(tmp_path / "out")


def test_clip_with_an_unknown_tensor_is_refused(hfailab: Source, tmp_path: Path) -> None:
    torch.save(torch.load(hfailab.clip) | {"visual.extra": torch.zeros(1)}, hfailab.clip)
    with pytest.raises(WeightsError, match=r"clip\.pt: not the weights of an OpenAI CLIP .*"):
        hfailab.convert(tmp_path / "out")


# --- full size ---


@pytest.mark.slow
def test_full_size_checkpoints_convert(tmp_path: Path) -> None:
    """The published listings of `coco`, with as many bytes as the real files."""
    from full_size import fill, listing

    clip_file, vqgan_file, gpt_file = (tmp_path / name for name in ("clip.pt", "vqgan.pt", "gpt.pt"))
    try:
        torch.save(fill(listing("clip_vit_b32").items()), clip_file)
        torch.save({"model": fill(listing("vqgan").items())}, vqgan_file)
        torch.save({"model": fill(listing("gpt2_medium").items())}, gpt_file)
        folder = convert_checkpoints(clip_file, vqgan_file, gpt_file, tmp_path / "out", "coco")
        facts = describe_model_dir(folder)
        with torch.device("meta"):
            expected = {"vqgan": VQGAN(COCO.vqgan), "gpt": GPT(COCO.gpt)}
        for part, model in expected.items():
            assert facts["parts"][part]["parameters"] == sum(p.numel() for p in model.parameters())
        assert facts["parts"]["clip"]["parameters"] == sum(t.numel() for t in torch.load(clip_file, mmap=True).values())
        assert any(gpu.startswith("T4") for gpu in facts["gpus"]["float16"])
    finally:
        shutil.rmtree(tmp_path)
