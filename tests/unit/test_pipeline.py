"""The whole pipeline from prompts to images, with small random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clipgen import ClipGen
from clipgen.errors import Cancelled, RequestError
from clipgen.images.pixels import clip_from_pixels, to_clip, to_pixels
from clipgen.models.capabilities import cpu_dtypes
from clipgen.models.gpt import Linear
from clipgen.request import GenerationRequest
from clipgen.weights.precision import Precision, pick_precision


@pytest.fixture(scope="module")
def pipe(tiny_weights: Path) -> ClipGen:
    return ClipGen.from_pretrained(tiny_weights, device="cpu", dtype="float32")


def plain_image(colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (40, 40), colour)


def same(a: Image.Image, b: Image.Image) -> bool:
    """Whether images are equal up to 1 of 255 levels: float32 convolutions round differently in other batch sizes."""
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max()) <= 1


def test_outputs_are_the_best_candidates_in_order(pipe: ClipGen) -> None:
    best = pipe("a lemon", num_outputs=3, candidates=8, seed=7)
    everything = pipe("a lemon", num_outputs=8, seed=7)
    assert len(best.images) == len(best.scores) == len(best.seeds) == 3
    assert best.scores == sorted(best.scores, reverse=True)
    assert best.scores == everything.scores[:3]
    assert sorted(everything.seeds) == list(range(7, 15))
    assert all(image.size == (32, 32) and image.mode == "RGB" for image in best.images)


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", cpu_dtypes())
def test_same_seed_gives_the_same_image_alone_in_a_batch_and_among_candidates(tiny_weights: Path, dtype: str) -> None:
    pipe = ClipGen.from_pretrained(tiny_weights, device="cpu", dtype=dtype)
    alone = pipe("a lemon", seed=3).images[0]
    among = pipe("a lemon", num_outputs=8, seed=0)
    assert same(alone, among.images[among.seeds.index(3)])
    many = pipe("a lemon", num_outputs=8, candidates=64, seed=0)
    for seed, image in zip(many.seeds, many.images, strict=True):
        assert same(pipe("a lemon", seed=seed).images[0], image)
    prompts = ["a dog", "a lemon", "a red heart", "pizza", "a cat", "a bus", "snow", "sun"]
    batch = pipe.generate([GenerationRequest(p, seed=3) for p in prompts])
    assert same(alone, batch[1].images[0])


def test_requests_with_different_sampling_share_a_call(pipe: ClipGen) -> None:
    requests = [GenerationRequest("a cat", seed=1, guidance=1.0), GenerationRequest("a cat", seed=1, guidance=4.0)]
    together = pipe.generate(requests)
    for request, result in zip(requests, together, strict=True):
        assert same(result.images[0], pipe.generate([request])[0].images[0])
    assert not same(together[0].images[0], together[1].images[0])


def test_scores_are_clip_cosines_of_the_images(pipe: ClipGen) -> None:
    result = pipe("a lemon", num_outputs=2, seed=0)
    again = pipe.clip.encode_image(to_clip(result.images, pipe.clip.image_size)) @ pipe.embed("a lemon")
    assert torch.allclose(again, torch.tensor(result.scores), atol=0.02)  # 8-bit rounding


def test_seed_zero_is_used_and_no_seed_becomes_a_random_one(pipe: ClipGen) -> None:
    assert pipe("a", seed=0).seed == 0
    first, second = pipe("a"), pipe("a")
    assert first.seed != second.seed
    assert same(first.images[0], pipe("a", seed=first.seed).images[0])


def test_mixed_prompt_is_the_weighted_sum_of_its_embeddings(pipe: ClipGen) -> None:
    red, blue = plain_image((255, 0, 0)), plain_image((0, 0, 255))
    text, image = pipe.embed("a lemon"), pipe.embed(red)
    assert torch.allclose(pipe.embed(["a lemon", red]), F.normalize(text + image, dim=0), atol=1e-5)
    mixed = pipe.embed([("a lemon", 1.0), (red, 0.5), (blue, -0.5)])
    expected = F.normalize(text + 0.5 * image - 0.5 * pipe.embed(blue), dim=0)
    assert torch.allclose(mixed, expected, atol=1e-5)
    assert len(pipe([("a lemon", 1.0), (red, -0.3)], seed=0).images) == 1


def test_transparent_image_is_accepted_as_prompt(pipe: ClipGen) -> None:
    assert pipe(Image.new("RGBA", (9, 20), (1, 2, 3, 0)), seed=0).images


def test_long_prompt_is_truncated_and_the_rest_is_reported(pipe: ClipGen) -> None:
    result = pipe("lemon " * 500 + "tail", seed=0)
    assert result.truncated.endswith("tail")
    assert pipe("a lemon", seed=0).truncated == ""


def test_progress_counts_every_token_up_to_the_total(pipe: ClipGen) -> None:
    seen: list[tuple[int, int]] = []
    pipe("a", seed=0, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 16) for i in range(1, 17)]


def test_cancelled_call_raises_before_and_after_decoding_tokens(pipe: ClipGen) -> None:
    with pytest.raises(Cancelled):
        pipe("a", seed=0, is_cancelled=lambda: True)
    asked: list[bool] = []
    with pytest.raises(Cancelled):  # after all tokens, before the pixels
        pipe("a", seed=0, is_cancelled=lambda: asked.append(True) or len(asked) > 16)
    assert len(asked) == 17


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("prompt", {"prompt": ""}),
        ("prompt", {"prompt": "  \n"}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": [("a", float("nan"))]}),
        ("prompt", {"prompt": [3]}),
        ("num_outputs", {"num_outputs": 0}),
        ("num_outputs", {"num_outputs": 1.5}),
        ("candidates", {"candidates": 2, "num_outputs": 3}),
        ("candidates", {"candidates": 10**6}),
        ("seed", {"seed": -1}),
        ("seed", {"seed": 2**40}),
        ("top_p", {"top_p": 0.0}),
        ("top_p", {"top_p": 1.5}),
        ("top_k", {"top_k": -1}),
        ("temperature", {"temperature": float("nan")}),
        ("temperature", {"temperature": -0.1}),
        ("guidance", {"guidance": float("inf")}),
        ("guidance", {"guidance": "3"}),
    ],
)
def test_bad_request_is_refused_with_its_field(field: str, arguments: dict) -> None:
    with pytest.raises(RequestError, match=field):
        GenerationRequest(**{"prompt": "a lemon", **arguments})


def test_prompt_whose_parts_cancel_is_refused(pipe: ClipGen) -> None:
    with pytest.raises(RequestError, match="cancel"):
        pipe([("a", 1.0), ("a", -1.0)])


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_missing_device_is_refused(tiny_weights: Path, device: str) -> None:
    with pytest.raises(RequestError, match="device"):
        ClipGen.from_pretrained(tiny_weights, device=device)


def test_every_precision_of_this_cpu_can_be_picked() -> None:
    cpu = torch.device("cpu")
    assert pick_precision("float32", cpu) == Precision("float32", torch.float32)
    with pytest.raises(RequestError, match="dtype is 'int7'; use one of float32, bfloat16, float16, int8"):
        pick_precision("int7", cpu)
    assert pick_precision(None, cpu).name == cpu_dtypes()[0]
    for name in cpu_dtypes():
        assert pick_precision(name, cpu).name == name


@pytest.mark.parametrize("packs_bf16", [False, True])
@pytest.mark.parametrize("has_bf16", [False, True])
@pytest.mark.parametrize("has_half", [False, True])
def test_precision_follows_the_capabilities_of_the_cpu(
    packs_bf16: bool, has_bf16: bool, has_half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_bf16 = has_bf16 and packs_bf16
    monkeypatch.setattr("clipgen.models.capabilities.can_prepack", lambda dtype: packs_bf16)
    for module in ("clipgen.models.capabilities", "clipgen.weights.precision"):
        monkeypatch.setattr(f"{module}.has_bfloat16", lambda: has_bf16)
    monkeypatch.setattr("clipgen.models.capabilities.has_half_products", lambda: has_half)
    cpu, compute = torch.device("cpu"), torch.bfloat16 if has_bf16 else torch.float32
    default = "bfloat16" if has_bf16 else "float16" if has_half else "float32"
    assert pick_precision(None, cpu) == Precision(default, compute)
    assert pick_precision("int8", cpu) == Precision("int8", compute)
    if has_half:
        assert pick_precision("float16", cpu) == Precision("float16", compute)
    else:
        with pytest.raises(RequestError, match="'float16', which this CPU cannot compute in; use one of"):
            pick_precision("float16", cpu)
    if packs_bf16:
        assert pick_precision("bfloat16", cpu) == Precision("bfloat16", torch.bfloat16)
    else:
        with pytest.raises(RequestError, match=r"'bfloat16', which this CPU cannot compute in; use one of.* int8"):
            pick_precision("bfloat16", cpu)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_same_seed_gives_the_same_image_with_quantised_weights(tiny_weights: Path, dtype: str) -> None:
    if dtype not in cpu_dtypes():
        pytest.skip(f"this CPU does not compute in {dtype}")
    pipe = ClipGen.from_pretrained(tiny_weights, device="cpu", dtype=dtype)
    assert pipe.precision == dtype and not any(isinstance(m, Linear) for m in pipe.gpt.modules())
    among = pipe("a lemon", num_outputs=4, seed=3, guidance=2.0)
    alone = pipe("a lemon", num_outputs=1, seed=among.seeds[1], guidance=2.0)
    assert same(alone.images[0], among.images[1])


def test_ranking_pixels_are_close_to_those_of_clip_preprocessing() -> None:
    image = Image.linear_gradient("L").convert("RGB").rotate(30)
    difference = clip_from_pixels(to_pixels([image], 64), 32) - to_clip([image], 32)
    assert difference.abs().mean() < 0.02  # 8-bit rounding between the two resizes


def test_kept_rows_have_the_tokens_of_the_image_and_the_others_new_ones(
    pipe: ClipGen, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[torch.Tensor] = []
    generate = pipe.engine.generate

    def watch(*args: object, **settings: object) -> object:
        output = generate(*args, **settings)  # type: ignore[arg-type]
        drawn.append(output.tokens)
        return output

    monkeypatch.setattr(pipe.engine, "generate", watch)
    photo = Image.radial_gradient("L").convert("RGB")
    pipe("a lemon", num_outputs=4, seed=0, keep=photo, keep_rows=2)
    size, grid = pipe.config.vqgan.image_size, pipe.config.vqgan.grid
    expected = pipe.vqgan.encode_tokens(to_pixels([photo], size))
    [tokens] = drawn
    assert torch.equal(tokens[:, : 2 * grid], expected[:, : 2 * grid].expand(4, -1))
    assert not (tokens[:, 2 * grid :] == expected[:, 2 * grid :]).all(dim=1).any()
