"""The image decoder: overflows of half precision are redone, and callers share batches."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clipgen.engine.image_decoder import ImageDecoder
from clipgen.errors import Cancelled, EngineError
from clipgen.models.clip import Clip
from clipgen.models.vqgan import VQGAN
from clipgen.utils import memory
from clipgen.utils.memory import HEADROOM, pixel_bytes
from clipgen.weights.model_dir import load_model_dir


@pytest.fixture
def parts(tiny_weights: Path) -> tuple[VQGAN, Clip]:
    config, tensors = load_model_dir(tiny_weights)
    vqgan = VQGAN(config.vqgan).eval().requires_grad_(False)
    vqgan.load_state_dict(tensors["vqgan"])
    return vqgan, Clip.from_state_dict(tensors["clip"])


TOKENS = torch.arange(48).view(3, 16)
EMBEDDINGS = F.normalize(torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), dim=1)


def test_images_that_overflow_in_float16_are_decoded_in_float32(
    parts: tuple[VQGAN, Clip], caplog: pytest.LogCaptureFixture
) -> None:
    vqgan, clip = parts
    vqgan.decoder.conv_in.weight.mul_(
        3e5
    )  # its sums leave float16's range of 65,504; the norms behind it bring them back
    exact = ImageDecoder(vqgan, clip).decode(TOKENS, EMBEDDINGS)
    with caplog.at_level(logging.WARNING):
        found = ImageDecoder(vqgan.half(), clip).decode(TOKENS, EMBEDDINGS)
    assert "decoded in float32" in caplog.text
    assert all((a.pixels - b.pixels).abs().mean() < 0.02 for a, b in zip(exact, found, strict=True))


def test_previews_are_decoded_in_batches_that_fit_into_memory(
    parts: tuple[VQGAN, Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    vqgan, clip = parts
    tokens = torch.arange(40)[:, None].expand(40, 16)
    together = ImageDecoder(vqgan, clip).preview(tokens)
    sizes: list[int] = []
    decode = vqgan.decode_tokens
    monkeypatch.setattr(vqgan, "decode_tokens", lambda part: sizes.append(len(part)) or decode(part))
    room = 3 * pixel_bytes(vqgan.config, torch.float32) / HEADROOM
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(room) + 1)
    for image, other in zip(ImageDecoder(vqgan, clip).preview(tokens), together, strict=True):
        assert np.abs(np.asarray(image, dtype=int) - np.asarray(other)).max() <= 1, "up to rounding"
    assert max(sizes) == 3 and sum(sizes) == 40


def test_damaged_weights_give_an_error_instead_of_grey_images(parts: tuple[VQGAN, Clip]) -> None:
    vqgan, clip = parts
    vqgan.post_quant_conv.bias[0] = torch.nan
    with pytest.raises(EngineError, match="not finite"):
        ImageDecoder(vqgan, clip).decode(TOKENS, EMBEDDINGS)


def test_score_that_is_not_a_number_ranks_last(parts: tuple[VQGAN, Clip]) -> None:
    vqgan, clip = parts
    embeddings = EMBEDDINGS.clone()
    embeddings[1] = torch.nan
    scores = [image.score for image in ImageDecoder(vqgan, clip).decode(TOKENS, embeddings)]
    assert scores[1] == -1 and min(scores[0], scores[2]) > -1


def test_concurrent_callers_get_their_own_images(parts: tuple[VQGAN, Clip]) -> None:
    decoder = ImageDecoder(*parts)
    [expected] = [decoder.decode(TOKENS, EMBEDDINGS)]
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(decoder.decode, TOKENS[i : i + 1], EMBEDDINGS[i : i + 1]) for i in range(3)]
        for call, image in zip(calls, expected, strict=True):
            assert (call.result(60)[0].pixels - image.pixels).abs().max() < 0.02


def test_cancelled_call_leaves_nothing_for_the_next_one(parts: tuple[VQGAN, Clip]) -> None:
    decoder = ImageDecoder(*parts)
    with pytest.raises(Cancelled):
        decoder.decode(TOKENS, EMBEDDINGS, is_cancelled=lambda: True)
    assert len(decoder.decode(TOKENS[:1], EMBEDDINGS[:1])) == 1
