"""The VQGAN: agreement with both reference implementations, the quantizer, shapes with pixel unshuffle."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from clipgen.config import VQGANConfig
from clipgen.errors import ConfigError
from clipgen.models.vqgan import VQGAN, Quantizer
from clipgen.weights.convert import map_vqgan
from clipgen.weights.model_dir import build_module

TINY = {"image_size": 32, "ch": 32, "ch_mult": [1, 1, 2], "num_res_blocks": 1, "attn_resolutions": [8]}
HFAILAB = VQGANConfig(**TINY, z_channels=32, embed_dim=32, codebook_size=64, beta=0.2, norm_eps=1e-5)
TAMING = VQGANConfig(**TINY, z_channels=32, embed_dim=24, codebook_size=64, beta=0.25, norm_eps=1e-6)
Map = Callable[[dict[str, Tensor], VQGANConfig], dict[str, Tensor]]


@pytest.mark.parametrize(
    ("name", "convert", "config"),
    [("hfailab_vqgan_tiny", map_vqgan, HFAILAB), ("taming_vqgan_tiny", map_vqgan, TAMING)],
)
def test_outputs_equal_those_of_the_original_implementation(
    golden: Path, name: str, convert: Map, config: VQGANConfig
) -> None:
    tensors = load_file(golden / f"{name}.safetensors")
    theirs = {key.removeprefix("model."): tensor for key, tensor in tensors.items() if key.startswith("model.")}
    vqgan = build_module(VQGAN, config, convert(theirs, config))
    close = {"rtol": 0.0, "atol": 1e-4}

    latent = vqgan.encode(tensors["io.image"])
    torch.testing.assert_close(latent, tensors["io.latent"], **close)
    quantized, loss, indices = vqgan.quantizer(latent)
    assert torch.equal(indices, tensors["io.indices"].flatten(1))
    torch.testing.assert_close(quantized, tensors["io.quantized"], **close)
    torch.testing.assert_close(loss, tensors["io.quant_loss"].squeeze(), **close)
    torch.testing.assert_close(vqgan.decode(quantized), tensors["io.reconstruction"], **close)

    # The ways that the pipeline takes.
    assert torch.equal(vqgan.encode_tokens(tensors["io.image"]), indices)
    torch.testing.assert_close(vqgan.decode_tokens(indices), tensors["io.reconstruction"], **close)
    torch.testing.assert_close(vqgan(tensors["io.image"])[0], tensors["io.reconstruction"], **close)


def small(**changes: object) -> VQGANConfig:
    values = {"image_size": 24, "patch": 3, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": []}
    return VQGANConfig(**(values | {"z_channels": 16, "embed_dim": 8, "codebook_size": 32} | changes))


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [({}, 16), ({"patch": 1}, 144), ({"ch_mult": [1]}, 64), ({"attn_resolutions": [8]}, 16), ({"l2_codes": True}, 16)],
)
def test_shapes_follow_the_configuration(changes: dict[str, object], tokens: int) -> None:
    config = small(**changes)
    torch.manual_seed(0)
    vqgan = VQGAN(config)
    images = torch.rand(2, 3, 24, 24) * 2 - 1
    pixels, loss, indices = vqgan(images)
    assert pixels.shape == images.shape
    assert loss.shape == ()
    assert indices.shape == (2, tokens) == (2, config.num_tokens)
    assert indices.dtype == torch.long
    torch.testing.assert_close(vqgan.decode_tokens(indices), pixels, rtol=0, atol=1e-5)


def test_local_encoder_gives_a_patch_the_same_token_wherever_it_is() -> None:
    torch.manual_seed(0)
    config = small(image_size=24, patch=4, ch_mult=[1], norm="none", local_encoder=True, l2_codes=True)
    vqgan = VQGAN(config).eval()
    for parameter in vqgan.encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # its residual branches start at zero
    images = torch.rand(2, 3, 24, 24) * 2 - 1
    tokens = vqgan.encode_tokens(images).view(2, 6, 6)
    assert len(tokens.unique()) > 5
    moved = vqgan.encode_tokens(images.roll((8, -4), (2, 3))).view(2, 6, 6)
    assert torch.equal(moved, tokens.roll((2, -1), (1, 2)))
    other = images.clone()
    other[:, :, :4] = -other[:, :, :4]
    assert torch.equal(vqgan.encode_tokens(other).view(2, 6, 6)[:, 1:], tokens[:, 1:])


@pytest.mark.parametrize(
    "changes", [{"norm": "group"}, {"ch_mult": [1, 2]}, {"ch_mult": [1], "norm": "none", "attn_resolutions": [8]}]
)
def test_local_encoder_is_refused_where_patches_would_see_each_other(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"vqgan\.local_encoder needs"):
        small(local_encoder=True, **({"norm": "none"} | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepacked_vqgan_decodes_the_same_images(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    vqgan = VQGAN(small(attn_resolutions=[8])).eval().requires_grad_(False)
    tokens = torch.randint(0, 32, (3, vqgan.config.num_tokens))
    expected = vqgan.decode_tokens(tokens)
    packed = copy.deepcopy(vqgan).to(dtype).prepack()
    found = packed.decode_tokens(tokens)
    assert (found.float() - expected).abs().max() < (0.04 * expected.abs().max() if dtype == torch.bfloat16 else 1e-6)
    with torch.inference_mode():
        assert torch.equal(packed.decode_tokens(tokens), found)
        assert packed.encode_tokens(torch.zeros(1, 3, 24, 24, dtype=dtype)).shape == (1, 16)


@pytest.mark.parametrize("l2_codes", [False, True])
def test_nearest_code_is_that_of_the_smallest_distance(l2_codes: bool) -> None:
    torch.manual_seed(0)
    quantizer = Quantizer(small(l2_codes=l2_codes))
    torch.nn.init.normal_(quantizer.embedding.weight)
    z = torch.randn(50, 8)
    if l2_codes:
        z = torch.nn.functional.normalize(z, dim=-1)
    assert torch.equal(quantizer.nearest(z), torch.cdist(z, quantizer.codes()).argmin(1))
    assert torch.equal(quantizer.nearest(quantizer.codes()), torch.arange(32))


def test_gradient_passes_straight_through_and_beta_weighs_the_codebook_term() -> None:
    torch.manual_seed(0)
    quantizer = Quantizer(small(beta=0.25))
    z = torch.randn(2, 8, 4, 4, requires_grad=True)
    z_q, loss, _ = quantizer(z)
    upstream = torch.randn_like(z_q)
    (gradient,) = torch.autograd.grad(z_q, z, upstream, retain_graph=True)
    assert torch.equal(gradient, upstream)
    to_encoder, to_codes = torch.autograd.grad(loss, [z, quantizer.embedding.weight])
    # Each code is pulled by what the encoder is pushed with, times beta.
    torch.testing.assert_close(to_codes.sum(0), -0.25 * to_encoder.sum((0, 2, 3)), rtol=1e-4, atol=1e-7)


def test_tokens_are_ordered_row_by_row() -> None:
    torch.manual_seed(0)
    vqgan = VQGAN(small())
    tokens = torch.zeros(1, 16, dtype=torch.long)
    changed = tokens.clone()
    changed[0, 3] = 1  # first row, last column
    codes = [vqgan.quantizer.lookup(t, 4, 4) for t in (tokens, changed)]
    assert (codes[0] != codes[1]).any(1).nonzero().tolist() == [[0, 0, 3]]


def test_model_without_norms_computes_the_same_in_training_and_inference() -> None:
    # Inference applies SiLU in place; without a norm in front its input is the residual stream itself.
    torch.manual_seed(0)
    model = VQGAN(small(norm="none", ch=24)).eval()  # GroupNorm would need a multiple of 32
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)  # the zeros that residual branches start from
    x = torch.rand(2, 3, model.config.image_size, model.config.image_size) * 2 - 1
    before = x.clone()
    trained = model(x)[0].detach()
    with torch.inference_mode():
        inferred = model(x)[0]
    torch.testing.assert_close(inferred, trained)
    assert torch.equal(x, before)
    assert not any(isinstance(module, torch.nn.GroupNorm) for module in model.modules())


def test_nearest_code_under_autocast_equals_the_one_without() -> None:
    generator = torch.Generator().manual_seed(0)
    quantizer = Quantizer(VQGANConfig(**TINY, codebook_size=1024, embed_dim=16, l2_codes=True))
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.randn(1024, 16, generator=generator))
    z = torch.nn.functional.normalize(torch.randn(2000, 16, generator=generator), dim=1)
    exact = (z.double() @ quantizer.codes().double().t()).argmax(1)
    assert (quantizer.nearest(z) == exact).float().mean() > 0.999
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert (quantizer.nearest(z) == exact).float().mean() > 0.999
