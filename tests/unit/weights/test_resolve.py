"""Published checkpoints through the real conversion: parity with the originals, every format, hostile files."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import types
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from published import TAMING, Source, hfailab_names, original, tiny_clip, written
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipgen import ClipGen
from clipgen.config import GPTConfig, ModelConfig, VQGANConfig
from clipgen.errors import WeightsError
from clipgen.models.clip import Clip
from clipgen.models.gpt import GPT
from clipgen.models.kv_cache import KVCache
from clipgen.models.vqgan import VQGAN
from clipgen.request import GenerationRequest, SamplingParams
from clipgen.weights import resolve as checkpoints
from clipgen.weights.catalog import File, PretrainedModel
from clipgen.weights.checkpoint_reader import read_tensors
from clipgen.weights.model_dir import load_weights
from clipgen.weights.resolve import convert_checkpoints, describe, resolve_weights
from train.config import load_config

CLOSE = {"rtol": 0.0, "atol": 1e-4}
LIGHTNING = "pytorch_lightning.callbacks.model_checkpoint"


# --- parity ---


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


def test_hfailabs_clip_and_vqgan(golden: Path, hfailab: Source, tmp_path: Path) -> None:
    pipe = hfailab.convert(tmp_path / "out")
    check_clip(pipe.clip, original(golden, "hfailab_clip_tiny")[1])
    check_vqgan(pipe.vqgan, original(golden, "hfailab_vqgan_tiny")[1])
    assert pipe("a lemon", seed=0).images[0].size == (32, 32)


def test_hfailabs_gpt(golden: Path, tmp_path: Path) -> None:
    gpt = GPTConfig(n_layer=3, n_head=4, n_embd=48, vocab_size=96, block_size=16, n_cond=24)
    vqgan = VQGANConfig(16, 1, 32, [1, 1, 1], 1, [], 32, 32, codebook_size=96)
    theirs, io = original(golden, "hfailab_gpt_tiny")
    clip = tiny_clip(24).state_dict()
    pipe = written(tmp_path, clip, hfailab_names(VQGAN(vqgan)), theirs, ModelConfig("tiny", vqgan, gpt)).convert(
        tmp_path / "out"
    )
    cache = KVCache.allocate(gpt, len(io["tokens"]))
    steps = [pipe.gpt.prefill(io["embedding"], cache)]
    steps += [pipe.gpt.step(io["tokens"][:, t - 1], t, cache) for t in range(1, gpt.block_size)]
    torch.testing.assert_close(torch.stack(steps, 1), io["logits"], **CLOSE)
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


def test_compvis_vqgan_in_a_lightning_checkpoint(
    golden: Path, hfailab: Source, tmp_path: Path, lightning_class: type
) -> None:
    theirs, io = original(golden, "taming_vqgan_tiny")
    theirs |= {"loss.discriminator.main.0.weight": torch.zeros(2), "loss.logvar": torch.zeros(())}
    callbacks = {lightning_class: {"best_model_score": torch.tensor(0.5), "best_model_path": "x.ckpt"}}
    hfailab.vqgan = tmp_path / "last.ckpt"
    torch.save({"epoch": 1, "callbacks": callbacks, "state_dict": theirs}, hfailab.vqgan)
    config = load_config(hfailab.config)
    config.model.vqgan = TAMING
    OmegaConf.save(OmegaConf.structured(config), hfailab.config)
    forget_lightning()  # whoever converts need not have it
    check_vqgan(hfailab.convert(tmp_path / "out").vqgan, io)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_openais_torchscript_archive(golden: Path, hfailab: Source, torchscript: Path, tmp_path: Path) -> None:
    hfailab.clip = torchscript
    check_clip(hfailab.convert(tmp_path / "out").clip, original(golden, "hfailab_clip_tiny")[1])
    program = torch.jit.load(str(torchscript)).state_dict()
    found = read_tensors(torchscript)
    assert found.keys() == program.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in program.items())


def test_our_own_files_convert_too(hfailab: Source, tmp_path: Path) -> None:
    first = hfailab.convert(tmp_path / "out")
    files = [tmp_path / "out" / f"{part}.safetensors" for part in ("clip", "vqgan", "gpt")]
    again = convert_checkpoints(*files, tmp_path / "again", hfailab.config)
    assert all((again / file.name).read_bytes() == file.read_bytes() for file in files)
    assert first.config == load_weights(again)[0]


def test_precision_is_kept(hfailab: Source, tmp_path: Path) -> None:
    content = torch.load(hfailab.gpt)
    content["model"] = {n: t.half() if t.is_floating_point() else t for n, t in content["model"].items()}
    torch.save(content, hfailab.gpt)
    folder = convert_checkpoints(hfailab.clip, hfailab.vqgan, hfailab.gpt, tmp_path / "out", hfailab.config)
    assert {tensor.dtype for tensor in load_file(folder / "gpt.safetensors").values()} == {torch.float16}


def test_bfloat16_stays_close(golden: Path, hfailab: Source, tmp_path: Path) -> None:
    """Half precision is for speed: pixels move by less than a level of 255 or two, CLIP's directions hardly turn."""
    hfailab.convert(tmp_path / "out")
    half = ClipGen.from_pretrained(tmp_path / "out", device="cpu", dtype="bfloat16")
    io = original(golden, "hfailab_vqgan_tiny")[1]
    pixels = half.vqgan.decode_tokens(io["indices"].flatten(1)).float()
    drift = (pixels - io["reconstruction"]).abs()
    io = original(golden, "hfailab_clip_tiny")[1]
    cosine = torch.nn.functional.cosine_similarity(half.clip.encode_image(io["pixels"]), io["image_embeds"])
    print(f"pixels: mean {drift.mean():.4f}, largest {drift.max():.4f} of 2; CLIP cosine {cosine.min():.5f}")
    assert drift.mean() < 2 * 2 / 255 and cosine.min() > 0.999


# --- files that do not fit ---


def test_a_missing_file_and_configuration(hfailab: Source, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="nowhere does not exist"):
        convert_checkpoints(tmp_path / "nowhere", hfailab.vqgan, hfailab.gpt, tmp_path / "out", hfailab.config)
    with pytest.raises(WeightsError, match="no configuration 'cocoa'"):
        convert_checkpoints(hfailab.clip, hfailab.vqgan, hfailab.gpt, tmp_path / "out", "cocoa")
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_what_they_should_be(hfailab: Source, tmp_path: Path) -> None:
    for field in ("clip", "vqgan", "gpt"):
        other = hfailab.gpt if field == "vqgan" else hfailab.vqgan
        paths = {"clip": hfailab.clip, "vqgan": hfailab.vqgan, "gpt": hfailab.gpt, field: other}
        with pytest.raises(WeightsError, match=other.name):
            convert_checkpoints(**paths, out=tmp_path / "out", config=hfailab.config)
    with pytest.raises(WeightsError, match=r"gpt\.pt: the HFAiLab GPT's tensors do not fit"):
        convert_checkpoints(hfailab.clip, written_vqgan(tmp_path), hfailab.gpt, tmp_path / "out", "coco")


def written_vqgan(folder: Path) -> Path:
    """A VQGAN of the size of coco, without its numbers."""
    path = folder / "zeros.safetensors"
    with torch.device("meta"):
        shapes = VQGAN(load_config("coco").model.vqgan).state_dict()
    save_file({name: torch.zeros(t.shape, dtype=torch.int8) for name, t in shapes.items()}, path)
    return path


def test_a_clip_of_another_width(hfailab: Source, tmp_path: Path) -> None:
    torch.save(tiny_clip(48).state_dict(), hfailab.clip)
    with pytest.raises(WeightsError, match=r"embeds in 48 dimensions, but gpt\.n_cond of .* is 32"):
        hfailab.convert(tmp_path / "out")


def test_a_clip_with_something_extra(hfailab: Source, tmp_path: Path) -> None:
    torch.save(torch.load(hfailab.clip) | {"visual.extra": torch.zeros(1)}, hfailab.clip)
    with pytest.raises(WeightsError, match=r"clip\.pt: not the weights of an OpenAI CLIP .*"):
        hfailab.convert(tmp_path / "out")


# --- what a folder holds; models by name ---


def test_describe(hfailab: Source, tmp_path: Path) -> None:
    pipe = hfailab.convert(tmp_path / "out")
    facts = json.loads(json.dumps(describe(tmp_path / "out")))
    assert facts["name"] == "tiny" and facts["config"]["gpt"]["n_embd"] == 32
    models = {"clip": pipe.clip, "vqgan": pipe.vqgan, "gpt": GPT(pipe.config.gpt)}  # that of the pipeline is packed
    for part, model in models.items():
        assert facts["parts"][part]["parameters"] == sum(p.numel() for p in model.parameters())
        assert facts["parts"][part]["bytes"] == (tmp_path / "out" / f"{part}.safetensors").stat().st_size
    assert facts["memory"]["float16"]["weights"] * 2 == facts["memory"]["float32"]["weights"]
    assert "T4 (64 candidates at a time)" in facts["gpus"]["float16"]
    assert not any("T4" in gpu for gpu in facts["gpus"]["bfloat16"])


def test_describe_what_is_not_there(hfailab: Source, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such folder"):
        describe(tmp_path / "nowhere")
    hfailab.convert(tmp_path / "out")
    (tmp_path / "out" / "gpt.safetensors").write_bytes(b"PK")
    with pytest.raises(WeightsError, match=r"gpt\.safetensors is no safetensors file"):
        describe(tmp_path / "out")
    (tmp_path / "out" / "gpt.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"gpt\.safetensors is missing"):
        describe(tmp_path / "out")


def test_a_folder_stays_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_weights(tmp_path, print) == tmp_path
    assert resolve_weights("weights/nowhere", print) == Path("weights/nowhere")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "coco").mkdir()
    assert resolve_weights("coco", print) == Path("coco")


def test_a_name_is_fetched_and_converted_once(hfailab: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A published model over HTTP: what a container does whose CLIPGEN_WEIGHTS is a name."""
    mirror = tmp_path / "mirror" / "tiny"
    mirror.mkdir(parents=True)
    files = [
        File(path.name, part, "https://nowhere.invalid/x") for part, path in vars(hfailab).items() if part != "config"
    ]
    for file in files:
        shutil.copy(getattr(hfailab, file.part), mirror / file.name)
    entry = PretrainedModel("tiny", "", "", "", tuple(files), config=hfailab.config)
    monkeypatch.setattr(checkpoints, "CATALOG", {"tiny": entry})

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(mirror.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("CLIPGEN_MIRROR", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("CLIPGEN_CACHE", str(tmp_path / "cache"))
    said: list[str] = []
    try:
        folder = resolve_weights("tiny", said.append)
    finally:
        server.shutdown()
        server.server_close()
    assert folder == tmp_path / "cache" / "models" / "tiny"
    assert any("converting tiny" in line for line in said)
    assert ClipGen.from_pretrained(folder, device="cpu").config.name == "tiny"
    assert resolve_weights("tiny", said.append) == folder  # the server is gone


def test_the_settings_of_the_original_demo() -> None:
    """64 candidates, top_k 500, top_p 0.95, best 8; test_pipeline and test_clip hold the fixes of its two mistakes."""
    request = GenerationRequest("a city bus", num_outputs=8, candidates=64)
    assert request.sampling(load_config("coco").model.sampling) == SamplingParams(1.0, 500, 0.95, guidance=1.0)
    assert (request.drawn, request.num_outputs) == (64, 8)


# --- full size ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vqgan", "gpt"), [("vqgan", "gpt2_medium"), ("taming", "gpt2_large")], ids=["coco", "taming-large"]
)
def test_full_size_checkpoints_convert(tmp_path: Path, vqgan: str, gpt: str) -> None:
    """Every published listing, with as many bytes as the real files have."""
    from full_size import fill, listing

    clip_file, vqgan_file, gpt_file = (tmp_path / name for name in ("clip.pt", "vqgan.pt", "gpt.pt"))
    wrapper = "state_dict" if vqgan == "taming" else "model"
    try:
        torch.save(fill(listing("clip_vit_b32").items()), clip_file)
        torch.save({wrapper: fill(listing(vqgan).items())}, vqgan_file)
        torch.save({"model": fill(listing(gpt).items())}, gpt_file)
        config = load_config("coco")
        if gpt == "gpt2_large":
            config.model.gpt = GPTConfig(n_layer=36, n_head=20, n_embd=1280)
        OmegaConf.save(OmegaConf.structured(config), tmp_path / "config.yaml")
        folder = convert_checkpoints(clip_file, vqgan_file, gpt_file, tmp_path / "out", str(tmp_path / "config.yaml"))
        facts = describe(folder)
        with torch.device("meta"):
            expected = {"vqgan": VQGAN(config.model.vqgan), "gpt": GPT(config.model.gpt)}
        for part, model in expected.items():
            assert facts["parts"][part]["parameters"] == sum(p.numel() for p in model.parameters())
        assert facts["parts"]["clip"]["parameters"] == sum(t.numel() for t in torch.load(clip_file, mmap=True).values())
        assert any(gpu.startswith("T4") for gpu in facts["gpus"]["float16"])
    finally:
        shutil.rmtree(tmp_path)
