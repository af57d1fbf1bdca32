"""The embedding-reconstruction loss of stage 2: its value, its gradient, and that it trains the GPT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from clipgen.config import ModelConfig, load_model_config
from clipgen.images.pixels import clip_from_pixels
from clipgen.models.clip import Clip
from clipgen.models.gpt import GPT
from clipgen.models.vqgan import VQGAN
from train.loop.optimization import load_model_weights
from train.loop.samples import generate_tokens
from train.losses.embedding import EmbeddingLoss


@pytest.fixture(scope="module")
def loss(tiny_config: ModelConfig, tiny_weights: Path) -> EmbeddingLoss:
    vqgan = VQGAN(tiny_config.vqgan).eval()
    load_model_weights(vqgan, tiny_weights / "vqgan.safetensors")
    return EmbeddingLoss(vqgan, Clip.from_state_dict(load_file(tiny_weights / "clip.safetensors")))


def embeddings(count: int, seed: int = 1) -> torch.Tensor:
    return F.normalize(torch.randn(count, 32, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_embedding_loss_is_the_clip_distance_of_the_most_likely_tokens(loss: EmbeddingLoss) -> None:
    logits, condition = torch.randn(3, 16, 64, generator=torch.Generator().manual_seed(0)), embeddings(3)
    pixels = loss.vqgan.decode_tokens(logits.argmax(-1))
    embedding = loss.clip.encode_image(clip_from_pixels(pixels, 32))
    expected = (1 - F.cosine_similarity(embedding, condition)).mean()
    assert loss(logits, condition)[0].item() == pytest.approx(expected.item(), abs=1e-5)


def test_dropped_condition_has_no_loss_and_no_gradient(loss: EmbeddingLoss) -> None:
    logits = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    condition = embeddings(2)
    alone = loss(logits[:1], condition[:1])[0]
    condition[1] = 0
    both = loss(logits, condition)[0]
    assert both.item() == pytest.approx(alone.item() / 2, abs=1e-6)
    both.backward()
    assert logits.grad[0].abs().max() > 0 and logits.grad[1].abs().max() == 0


def test_gradient_is_the_straight_through_one_of_the_softmax(loss: EmbeddingLoss) -> None:
    logits = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    condition, codes = embeddings(1), loss.vqgan.quantizer.codes().detach()
    loss(logits, condition)[0].backward()

    def distance(z: torch.Tensor) -> torch.Tensor:
        pixels = loss.vqgan.decode(z.t().reshape(1, 8, 4, 4))
        return 1 - (loss.clip.encode_image(clip_from_pixels(pixels, 32)) * condition).sum()

    z = codes[logits[0].argmax(-1)].clone().requires_grad_()  # (T, C)
    (slope,) = torch.autograd.grad(distance(z), z)
    # Check the slope by finite differences along a random direction.
    step = 1e-2 * F.normalize(torch.randn(z.shape, generator=torch.Generator().manual_seed(2)), dim=1)
    with torch.no_grad():
        rise = (distance(z + step) - distance(z - step)).item() / 2
    assert rise == pytest.approx((slope * step).sum().item(), rel=0.05)
    probabilities = logits.detach()[0].softmax(-1)
    gain = slope @ codes.t()  # (T, V): derivative with respect to the weight of each code
    expected = probabilities * (gain - (probabilities * gain).sum(-1, keepdim=True))
    assert torch.allclose(logits.grad[0], expected, atol=1e-6)


def learn(loss: EmbeddingLoss, gpt: GPT, tokens: torch.Tensor, condition: torch.Tensor, lr: float) -> list[float]:
    """Train a GPT by this loss alone for 15 steps; the distance before each."""
    optimizer = torch.optim.Adam(gpt.parameters(), lr)
    found = []
    for _ in range(15):
        optimizer.zero_grad()
        distance = loss(gpt(tokens, condition), condition)[0]
        distance.backward()
        optimizer.step()
        found.append(distance.item())
    assert all(p.grad is None for p in loss.parameters())
    return found


def test_few_steps_bring_images_nearer_to_the_condition(
    loss: EmbeddingLoss, tiny_config: ModelConfig, tiny_weights: Path
) -> None:
    gpt = GPT(tiny_config.gpt)
    load_model_weights(gpt, tiny_weights / "gpt.safetensors")
    tokens = torch.randint(64, (4, 15), generator=torch.Generator().manual_seed(0))
    found = learn(loss, gpt, tokens, embeddings(4), lr=3e-3)
    assert sum(found[-3:]) / 3 < found[0] - 0.015  # little, as random towers embed all images alike


@pytest.mark.slow
def test_few_steps_of_the_mini_model_bring_images_nearer_to_a_sentence(root: Path) -> None:
    folder = root / "weights" / "mini"
    config = load_model_config(folder / "config.yaml")
    vqgan, gpt = VQGAN(config.vqgan), GPT(config.gpt)
    for part, name in ((vqgan, "vqgan"), (gpt, "gpt")):
        part.load_state_dict(load_file(folder / f"{name}.safetensors"))
    clip = Clip.from_state_dict(load_file(folder / "clip.safetensors"))
    sentences = clip.encode_text(["a red heart", "a yellow lemon", "a green leaf", "a blue whale"])
    tokens = generate_tokens(gpt.eval(), sentences, range(4), config.sampling).clone()[:, :-1]
    found = learn(EmbeddingLoss(vqgan, clip), gpt, tokens, sentences, lr=1e-4)
    assert sum(found[-3:]) / 3 < 0.9 * found[0]
