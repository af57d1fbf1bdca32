"""The frozen CLIP: agreement with OpenAI's implementation, prompts of every kind, and refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from clipgen.errors import ConfigError, WeightsError
from clipgen.models import clip as clip_module
from clipgen.models.clip import Clip, find_openai_clip, tokenize

GOLDEN = Path(__file__).parents[2] / "golden"
START, END = 49406, 49407


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "hfailab_clip_tiny.safetensors")


@pytest.fixture(scope="module")
def weights(golden: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("model."): t for name, t in golden.items() if name.startswith("model.")}


@pytest.fixture(scope="module")
def clip(weights: dict[str, Tensor]) -> Clip:
    return Clip.from_state_dict(weights)


def shortened(weights: dict[str, Tensor], context_length: int) -> dict[str, Tensor]:
    return weights | {"positional_embedding": weights["positional_embedding"][:context_length]}


# --- tokens ---


def test_tokens_equal_those_of_openai() -> None:
    golden = json.loads((GOLDEN / "clip_bpe_tokens.json").read_text())
    tokens, truncated = tokenize(golden["texts"], 77)
    assert tokens.dtype == torch.long and tokens.shape == (3, 77)
    for row, expected in zip(tokens.tolist(), golden["tokens"], strict=True):
        assert row == expected + [0] * (77 - len(expected))
    assert truncated == ["", "", ""]


def test_long_prompt_keeps_its_end_token_and_returns_the_truncated_text() -> None:
    words = " ".join(f"word{i}" for i in range(500))
    tokens, truncated = tokenize([words, "a lemon"], 77)
    assert tokens[0, -1] == END and tokens[0, 0] == START
    full, _ = tokenize([words], 2000)
    assert tokens[0, :-1].equal(full[0, :76])
    assert truncated[0].endswith("4 9 9") and truncated[0].count("word") >= 470
    assert truncated[1] == ""


@pytest.mark.parametrize(
    ("context_length", "truncated"), [(6, ""), (5, "hair"), (4, "with hair"), (2, "lemon with hair a")]
)
def test_truncated_text_starts_at_the_first_token_that_does_not_fit(context_length: int, truncated: str) -> None:
    prompt = "lemon with hair a" if context_length == 2 else "a lemon with hair"
    tokens, tails = tokenize([prompt], context_length)
    assert tails == [truncated]
    assert int((tokens[0] == END).sum()) == 1


def test_text_far_beyond_the_context_is_returned_without_being_encoded() -> None:
    _, truncated = tokenize(["lemon " * 200_000 + "last", "x" * 200_000], 77)
    assert truncated[0].endswith("lemon last") and truncated[0].count("lemon") == 200_000 - 75
    assert len(truncated[1]) > 190_000


@pytest.mark.parametrize("prompt", ["<|endoftext|> a lemon", "a <|startoftext|> lemon", "&lt;|endoftext|&gt; a lemon"])
def test_control_tokens_in_a_prompt_are_dropped(prompt: str) -> None:
    assert tokenize([prompt], 77)[0].equal(tokenize(["a lemon"], 77)[0])


@settings(max_examples=200)
@given(st.text(st.characters(), max_size=200), st.integers(2, 77))
def test_any_text_becomes_valid_tokens(prompt: str, context_length: int) -> None:
    tokens, truncated = tokenize([prompt], context_length)
    row = tokens[0].tolist()
    end = row.index(END)
    assert len(row) == context_length and row[0] == START
    assert START not in row[1:] and not any(row[end + 1 :])
    assert truncated[0] == "" or end == context_length - 1


def test_single_string_is_one_prompt() -> None:
    assert tokenize("a lemon", 77)[0].shape == (1, 77)


def test_context_without_room_for_start_and_end_is_refused() -> None:
    with pytest.raises(WeightsError, match="context_length is 1"):
        tokenize(["a"], 1)


@pytest.mark.parametrize("vocab_size", [514, 5_000, 49_407])
@settings(max_examples=50)
@given(prompt=st.text(max_size=100))
def test_smaller_vocabulary_reads_the_same_text_in_as_many_tokens_or_more(vocab_size: int, prompt: str) -> None:
    [few], _ = tokenize([prompt], 2_000, vocab_size)
    [many], _ = tokenize([prompt], 2_000)
    ids = few[: int(few.argmax()) + 1].tolist()
    assert ids[0] == vocab_size - 2 and ids[-1] == vocab_size - 1 == few.max()
    assert len(ids) >= int(many.argmax()) + 1
    assert tokenize([prompt], 2, vocab_size)[1] == tokenize([prompt], 2)[1]  # all of it, decoded again


def test_smaller_vocabulary_keeps_the_numbers_of_common_words() -> None:
    [few], [many] = (tokenize(["a lemon with hair"], 77, size)[0][:, 1:5] for size in (20_000, 49_408))
    assert few.equal(many)


# --- towers ---


def test_embeddings_equal_those_of_openai(clip: Clip, golden: dict[str, Tensor]) -> None:
    text = clip.model.encode_text(golden["io.text_tokens"].long())
    image = clip.model.encode_image(golden["io.pixels"])
    torch.testing.assert_close(text, golden["io.text_embeds"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(image, golden["io.image_embeds"], atol=1e-4, rtol=1e-4)
    unit = golden["io.image_embeds"] / golden["io.image_embeds"].norm(dim=-1, keepdim=True)
    torch.testing.assert_close(clip.encode_image(golden["io.pixels"]), unit, atol=1e-5, rtol=1e-4)


def test_float32_weights_are_kept_exactly(clip: Clip, weights: dict[str, Tensor]) -> None:
    for name, tensor in clip.model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert tensor.equal(weights[name].float()), name


def test_sizes_are_read_from_the_weights(clip: Clip, weights: dict[str, Tensor]) -> None:
    assert (clip.image_size, clip.embed_dim, clip.context_length) == (32, 32, 77)
    assert Clip.from_state_dict(shortened(weights, 32)).context_length == 32


def test_size_entries_of_openai_are_accepted_and_the_weights_unchanged(weights: dict[str, Tensor]) -> None:
    given = weights | {k: torch.tensor(1) for k in ("input_resolution", "context_length", "vocab_size")}
    names = set(given)
    clip = Clip.from_state_dict(given)
    clip.model.text_projection.data.zero_()
    assert set(given) == names and given["text_projection"].any()


PROMPTS = ["a", "hello!!!??? wow", "sketch of a lemon with hair", "word " * 90, ""]


@pytest.mark.parametrize("context_length", [77, 8])
def test_positions_after_the_longest_prompt_have_no_effect(weights: dict[str, Tensor], context_length: int) -> None:
    clip = Clip.from_state_dict(shortened(weights, context_length))
    padded = clip.model.encode_text(tokenize(PROMPTS, context_length)[0])
    expected = torch.nn.functional.normalize(padded, dim=-1)
    for prompts, rows in ((PROMPTS[:3], expected[:3]), (PROMPTS[1:2], expected[1:2]), (PROMPTS, expected)):
        torch.testing.assert_close(clip.encode_text(prompts), rows, atol=1e-5, rtol=1e-4)


def test_embeddings_are_unit_norm_float32(clip: Clip, golden: dict[str, Tensor]) -> None:
    for embedding in (clip.encode_text(PROMPTS), clip.encode_image(golden["io.pixels"])):
        assert embedding.dtype == torch.float32 and embedding.shape[1] == clip.embed_dim
        torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(len(embedding)))


def test_no_prompts_give_no_embeddings(clip: Clip) -> None:
    assert clip.encode_text([]).shape == (0, clip.embed_dim)


def test_bfloat16_is_close_to_float32(clip: Clip, weights: dict[str, Tensor], golden: dict[str, Tensor]) -> None:
    half = Clip.from_state_dict(weights, dtype=torch.bfloat16)
    assert half.model.visual.conv1.weight.dtype == torch.bfloat16
    assert half.model.ln_final.weight.dtype == torch.float32
    for a, b in (
        (half.encode_text(PROMPTS), clip.encode_text(PROMPTS)),
        (half.encode_image(golden["io.pixels"]), clip.encode_image(golden["io.pixels"])),
    ):
        assert a.dtype == torch.float32
        assert (a * b).sum(-1).min() > 0.999


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("dtype", "cosine"), [(torch.float32, 0.99999), (torch.float16, 0.9999), (torch.bfloat16, 0.999)]
)
def test_embeddings_on_a_gpu_are_close_to_those_on_a_cpu(
    clip: Clip, weights: dict[str, Tensor], golden: dict[str, Tensor], dtype: torch.dtype, cosine: float
) -> None:
    gpu = Clip.from_state_dict(weights, "cuda", dtype)
    text, image = gpu.encode_text(PROMPTS).cpu(), gpu.encode_image(golden["io.pixels"]).cpu()
    assert (text * clip.encode_text(PROMPTS)).sum(-1).min() > cosine
    assert (image * clip.encode_image(golden["io.pixels"])).sum(-1).min() > cosine


def test_weights_are_frozen_and_pixels_differentiable(clip: Clip, golden: dict[str, Tensor]) -> None:
    assert not any(p.requires_grad for p in clip.parameters())
    pixels = golden["io.pixels"].clone().requires_grad_()
    clip.encode_image(pixels)[:, 0].sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().sum() > 0


def test_towers_stay_in_eval_mode_inside_a_training_model(clip: Clip) -> None:
    outer = torch.nn.ModuleList([clip]).train()
    assert outer.training and not any(module.training for module in clip.modules())


def test_resnet_clip_equals_the_original(weights: dict[str, Tensor], golden: dict[str, Tensor]) -> None:
    from clipgen.models.clip import OpenAIClip

    torch.manual_seed(0)
    reference = OpenAIClip(32, 32, (1, 1, 1, 1), 4, None, 77, 49408, 64, 1, 2).eval()
    ours = Clip.from_state_dict(reference.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(
            ours.model.encode_image(golden["io.pixels"]), reference.encode_image(golden["io.pixels"])
        )


# --- refusals ---


def test_weights_that_are_no_openai_clip_are_refused(weights: dict[str, Tensor]) -> None:
    without = {k: v for k, v in weights.items() if k != "visual.ln_post.weight"}
    with pytest.raises(WeightsError, match=r"visual\.ln_post\.weight"):
        Clip.from_state_dict(without)
    with pytest.raises(WeightsError, match="surplus"):
        Clip.from_state_dict(weights | {"surplus": torch.zeros(1)})
    with pytest.raises(WeightsError, match="size mismatch for text_projection"):
        Clip.from_state_dict(weights | {"text_projection": torch.zeros(3, 32)})
    with pytest.raises(WeightsError, match="not the weights of an OpenAI CLIP"):
        Clip.from_state_dict({})
    with pytest.raises(WeightsError, match="has 100 rows"):
        Clip.from_state_dict(weights | {"token_embedding.weight": torch.zeros(100, 64)})


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 3, 64, 64), (1, 1, 32, 32)])
def test_pixels_of_another_shape_are_refused(clip: Clip, shape: tuple[int, ...]) -> None:
    with pytest.raises(WeightsError, match=r"must be \(B, 3, 32, 32\)"):
        clip.encode_image(torch.zeros(shape))


# --- finding OpenAI's package ---

DRAW_WITH_CLIP = """
import pathlib, sys
from clipgen.models.clip import Clip, find_openai_clip, tokenize
print(find_openai_clip().parent.name, tokenize(["a lemon"], 77)[0][0, :4].tolist())
"""


@pytest.mark.parametrize(("how", "shadow"), [("-c", "clip.py"), ("script", "clip/__init__.py")])
def test_users_file_named_like_the_package_is_not_executed(root: Path, tmp_path: Path, shadow: str, how: str) -> None:
    (tmp_path / shadow).parent.mkdir(exist_ok=True)
    (tmp_path / shadow).write_text("raise SystemExit('executed')")
    (tmp_path / "script.py").write_text(DRAW_WITH_CLIP)
    command = [sys.executable, *(["-c", DRAW_WITH_CLIP] if how == "-c" else ["script.py"])]
    environ = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.stdout == "site-packages [49406, 320, 7184, 49407]\n", done.stderr


def test_modules_load_without_pkg_resources_and_torchvision(root: Path) -> None:
    code = "import sys\nsys.modules['pkg_resources'] = sys.modules['torchvision'] = None\n" + DRAW_WITH_CLIP
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "49406" in done.stdout, done.stderr


@pytest.mark.parametrize("shadow", ["clip.py", "clip"])
def test_package_that_is_missing_is_named_with_the_file_that_shadows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shadow: str
) -> None:
    def not_installed(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(clip_module, "distribution", not_installed)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "clip", raising=False)
    if shadow == "clip":
        (tmp_path / shadow).mkdir()
    else:
        (tmp_path / shadow).write_text("raise SystemExit('executed')")
    with pytest.raises(ConfigError, match=rf"not installed; {tmp_path / shadow} has its name but is something else"):
        find_openai_clip()
