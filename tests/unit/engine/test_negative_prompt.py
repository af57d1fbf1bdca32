"""Negative prompts: their condition replaces "no condition" in guidance, and moves images away from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import clipgen.engine.batch
from clipgen import ClipGen
from clipgen.config import GPTConfig
from clipgen.engine.batch import Batch
from clipgen.engine.sequence import Sequence
from clipgen.errors import RequestError
from clipgen.images.pixels import to_clip
from clipgen.models.gpt import GPT
from clipgen.request import GenerationRequest, SamplingParams

SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=96, block_size=20, n_cond=16)
SCALE = 2.5
GUIDED = SamplingParams(top_k=40, top_p=0.9, guidance=SCALE)


@pytest.fixture(scope="module")
def gpt() -> GPT:
    torch.manual_seed(0)
    gpt = GPT(SMALL).eval()
    with torch.no_grad():  # untrained weights hardly depend on the condition
        gpt.head.weight.mul_(20)
        gpt.cond_proj.weight.mul_(5)
    return gpt


@pytest.fixture(scope="module")
def pipe(tiny_weights: Path) -> ClipGen:
    return ClipGen.from_pretrained(tiny_weights, device="cpu", dtype="float32")


def point(seed: int) -> Tensor:
    return F.normalize(torch.randn(SMALL.n_cond, generator=torch.Generator().manual_seed(seed)), dim=0)


def run(gpt: GPT, sequences: list[Sequence], patch: pytest.MonkeyPatch) -> tuple[list[Tensor], Tensor]:
    """Tokens (T,) of sequences in one batch, and the logits (T, n, V) that they were sampled from."""
    seen: list[Tensor] = []
    sample = clipgen.engine.batch.sample
    with patch.context() as inside, torch.inference_mode():
        inside.setattr(
            clipgen.engine.batch, "sample", lambda logits, *rest: (seen.append(logits), sample(logits, *rest))[1]
        )
        batch = Batch(gpt)
        batch.add(sequences, 64)
        while not (done := batch.finished()):
            batch.step()
    return [done[seq] for seq in sequences], torch.stack(seen)


def test_guided_logits_start_from_those_of_the_negative_prompt(gpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    condition, negative = point(0), point(1)
    guided = Sequence(condition, 3, GUIDED, negative_condition=negative)
    (tokens,), logits = run(gpt, [guided], monkeypatch)
    # Logits of each condition alone for the same tokens; a prefix must leave at least one token free.
    plain = [Sequence(point, 3, SamplingParams(), prefix_tokens=tokens[:-1]) for point in (condition, negative)]
    _, parts = run(gpt, plain, monkeypatch)
    assert torch.equal(logits[:, 0], parts[:, 1] + SCALE * (parts[:, 0] - parts[:, 1]))
    assert not torch.equal(parts[:, 0], parts[:, 1])


def test_negative_prompt_equal_to_prompt_cancels_guidance(gpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    seq = Sequence(point(0), 3, GUIDED)
    variants = [
        seq,
        replace(seq, negative_condition=torch.zeros(SMALL.n_cond)),
        replace(seq, negative_condition=point(1)),
        replace(seq, negative_condition=point(0)),
        replace(seq, params=replace(GUIDED, guidance=1.0)),
    ]
    (none, zeros, other, itself, unguided), _ = run(gpt, variants, monkeypatch)
    assert torch.equal(none, zeros) and torch.equal(itself, unguided)
    assert not torch.equal(none, other) and not torch.equal(none, itself)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_the_same_beside_sequences_with_and_without_negatives(
    gpt: GPT, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = GPT(SMALL).eval().to(dtype)
    model.load_state_dict(gpt.state_dict())
    sequences = [Sequence(point(i), i, GUIDED, negative_condition=point(50 + i) if i % 2 else None) for i in range(7)]
    sequences.insert(2, Sequence(point(9), 9, SamplingParams()))
    together, _ = run(model, sequences, monkeypatch)
    for seq, tokens in zip(sequences, together, strict=True):
        ((alone,), _) = run(model, [seq], monkeypatch)
        assert torch.equal(alone, tokens)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, int)


def test_text_image_and_mixture_are_accepted_as_negative_prompt(pipe: ClipGen) -> None:
    photo = Image.linear_gradient("L").convert("RGB")
    negatives = [None, "a dog", photo, [("a dog", 1.0), (photo, -0.5)]]
    results = pipe.generate([GenerationRequest("a lemon", seed=4, negative_prompt=negative) for negative in negatives])
    images = [pixels(result.images[0]) for result in results]
    for i, one in enumerate(images):
        assert all((one != other).any() for other in images[i + 1 :])
    again = pipe("a lemon", seed=4, negative_prompt="a dog")
    assert np.abs(pixels(again.images[0]) - images[1]).max() <= 1


def test_ranking_uses_the_prompt_alone(pipe: ClipGen) -> None:
    result = pipe("a lemon", num_outputs=4, candidates=8, seed=4, negative_prompt="a dog")
    found = pipe.clip.encode_image(to_clip(result.images, pipe.clip.image_size))
    scores = torch.tensor(result.scores)
    assert torch.allclose(found @ pipe.embed("a lemon"), scores, atol=0.02)  # 8-bit rounding
    assert not torch.allclose(found @ pipe.embed("a dog"), scores, atol=0.02)


def test_truncated_negative_prompt_is_reported(pipe: ClipGen) -> None:
    assert pipe("a lemon", seed=0, negative_prompt="dog " * 500 + "tail").truncated.endswith("tail")


@pytest.mark.parametrize("guidance", [0, 0.5, 1])
def test_negative_prompt_without_guidance_is_refused_with_the_remedy(pipe: ClipGen, guidance: float) -> None:
    with pytest.raises(RequestError, match=f"guidance is {guidance:g}; .* above 1: raise it") as caught:
        GenerationRequest("a lemon", negative_prompt="a dog", guidance=guidance)
    assert caught.value.field == "guidance"


def test_negative_prompt_is_refused_if_the_model_has_no_guidance(pipe: ClipGen) -> None:
    request = GenerationRequest("a lemon", negative_prompt="a dog")
    with pytest.raises(RequestError, match="guidance is 1"):
        request.sampling(SamplingParams(guidance=1.0))
    assert request.sampling(SamplingParams(guidance=2.0)).guidance == 2


@pytest.mark.parametrize("negative", ["", " ", [], 3, [("a", float("nan"))], [""]])
def test_unusable_negative_prompt_is_refused_by_name(negative: object) -> None:
    with pytest.raises(RequestError, match="negative") as caught:
        GenerationRequest("a lemon", negative_prompt=negative)  # type: ignore[arg-type]
    assert caught.value.field.startswith("negative")


def test_negative_prompt_whose_parts_cancel_is_refused(pipe: ClipGen) -> None:
    with pytest.raises(RequestError, match="negative_prompt has parts that cancel"):
        pipe("a lemon", negative_prompt=[("a", 1.0), ("a", -1.0)])


PAIRS = [
    *[("a heart", "a red heart"), ("an apple", "a red apple"), ("a car", "a red car"), ("a cat", "an orange cat")],
    *[("a book", "a red book"), ("a lemon", "a yellow lemon"), ("a frog", "a green frog"), ("a rose", "a red rose")],
    *[("a robot", "a gray robot"), ("a star", "a yellow star"), ("a house", "pixel art of a house")],
    ("a pumpkin", "a pumpkin with a face"),
]


@pytest.mark.slow
def test_images_of_the_mini_model_move_away_from_the_negative_prompt(root: Path) -> None:
    """Mean over 12 pairs and 8 seeds, by the mini CLIP; single pairs fail."""
    pipe = ClipGen.from_pretrained(root / "weights" / "mini", device="cpu")
    nearer = []
    for prompt, negative in PAIRS:
        plain, moved = (
            GenerationRequest(prompt, 8, seed=0, guidance=3.0, negative_prompt=other) for other in (None, negative)
        )
        cosines = [
            torch.stack([pipe.embed(image) for image in result.images]) @ pipe.embed(negative)
            for result in pipe.generate([plain, moved])
        ]
        nearer.append((cosines[1].mean() - cosines[0].mean()).item())
    assert sum(nearer) / len(nearer) < -0.1, nearer
    assert sum(change < 0 for change in nearer) >= 8, nearer
