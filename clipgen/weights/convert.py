"""Published checkpoints under our names: HFAiLab's CLIP-GEN (release v0.1.0), CompVis' VQGAN, OpenAI's CLIP.

Each function goes through the names of our network, takes the tensors that stand for them in the foreign state dict and
checks their shapes. What is left over must be training state that is known by name. Nothing is copied except the
attention's q, k and v of CompVis, which become one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from clipgen.config import GPTConfig, VQGANConfig
from clipgen.errors import WeightsError
from clipgen.models.clip import Clip
from clipgen.models.gpt import GPT
from clipgen.models.meta_init import meta_init
from clipgen.models.vqgan import VQGAN, AttnBlock, Downsample, ResBlock, Upsample
from clipgen.weights.model_dir import check_fit

Rules = Sequence[tuple[str, str]]

# Our name -> theirs: patterns, applied one after another.
_HFAILAB_VQGAN: Rules = (
    (r"^quant_conv\.", "encoder.final.3."),
    (r"^post_quant_conv\.", "decoder.quant_conv_in."),
    (r"\.norm_out\.", ".final.0."),
    (r"\.conv_out\.", ".final.2."),
    (r"\.norm1\.", ".block.0."),
    (r"\.conv1\.", ".block.2."),
    (r"\.norm2\.", ".block.3."),
    (r"\.conv2\.", ".block.6."),  # after the activation (4) and dropout (5)
    (r"\.qkv\.", ".attn.in_proj_"),
    (r"\.proj\.", ".attn.out_proj."),
)
_HFAILAB_GPT: Rules = (
    (r"^(blocks\.\d+)\.", r"\1.encoder."),
    (r"\.qkv\.", ".self_attn.in_proj_"),
    (r"\.proj\.", ".self_attn.out_proj."),
    (r"\.fc1\.", ".linear1."),
    (r"\.fc2\.", ".linear2."),
)
_TAMING_VQGAN: Rules = (
    (r"^quantizer\.", "quantize."),
    (r"\.mid\.0\.", ".mid.block_1."),
    (r"\.mid\.1\.", ".mid.attn_1."),
    (r"\.mid\.2\.", ".mid.block_2."),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"\.proj\.", ".proj_out."),
)


def map_clip(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CLIP, whose names are OpenAI's everywhere; the sizes and masks that its program carries are left out.

    Raises:
        WeightsError: a tensor is missing, unknown or of a shape that does not fit the others.
    """
    given = {name: tensor for name, tensor in state_dict.items() if not re.fullmatch(_CLIP_STATE, name)}
    try:
        Clip.from_state_dict({name: torch.empty_like(tensor, device="meta") for name, tensor in given.items()}, "meta")
    except WeightsError as error:
        raise WeightsError(str(error)) from error
    return given


_CLIP_STATE = r"input_resolution|context_length|vocab_size|(visual\.)?transformer\.resblocks\.\d+\.attn_mask"


def map_vqgan(state_dict: Mapping[str, Tensor], config: VQGANConfig) -> dict[str, Tensor]:
    """A VQGAN of HFAiLab's, of CompVis' or of ours, told apart by their names, as a state dict of `VQGAN(config)`.

    Raises:
        WeightsError: a tensor is missing, unknown or of another shape.
    """
    if "quantize.embedding.weight" in state_dict:
        return map_taming_vqgan(state_dict, config)
    if "decoder.quant_conv_in.weight" in state_dict:
        return map_hfailab_vqgan(state_dict, config)
    with meta_init():
        expected = _shapes(VQGAN(config))
    check_fit(expected, state_dict, "VQGAN")
    return dict(state_dict)


def map_gpt(state_dict: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """A GPT of HFAiLab's or of ours, told apart by their names, as a state dict of `GPT(config)`.

    Raises:
        WeightsError: a tensor is missing, unknown or of another shape.
    """
    if any(name.startswith("blocks.0.encoder.") for name in state_dict):
        return map_hfailab_gpt(state_dict, config)
    with meta_init():
        expected = _shapes(GPT(config))
    check_fit(expected, state_dict, "GPT")
    return dict(state_dict)


def map_hfailab_vqgan(state_dict: Mapping[str, Tensor], config: VQGANConfig) -> dict[str, Tensor]:
    """HFAiLab's VQGAN (the "model" entry of `vqgan_coco.pt`) as a state dict of `VQGAN(config)`.

    Raises:
        WeightsError: a tensor is missing, unknown or of another shape; only the discriminator is left out.
    """
    with meta_init():
        expected = _shapes(VQGAN(config))
    sources = {name: [_rename(name, _HFAILAB_VQGAN)] for name in expected}
    return _take(state_dict, expected, sources, ignored=r"discriminator\.", model="HFAiLab VQGAN")


def map_taming_vqgan(state_dict: Mapping[str, Tensor], config: VQGANConfig) -> dict[str, Tensor]:
    """CompVis' VQGAN (the "state_dict" entry of its Lightning checkpoint) as a state dict of `VQGAN(config)`.

    Raises:
        WeightsError: a tensor is missing, unknown or of another shape; only `loss.*`, which holds the discriminator and
            the perceptual network, is left out.
    """
    with meta_init():
        model = VQGAN(config)
    expected = _shapes(model)
    levels = len(config.ch_mult)
    places = _taming_places("encoder.down", model.encoder.down, range(levels))
    places |= _taming_places("decoder.up", model.decoder.up, range(levels - 1, -1, -1))
    sources = {name: _taming_names(name, places) for name in expected}
    return _take(state_dict, expected, sources, ignored=r"loss\.", model="CompVis VQGAN")


def map_hfailab_gpt(state_dict: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """HFAiLab's GPT (the "model" entry of `gpt_coco.pt`) as a state dict of `GPT(config)`.

    Raises:
        WeightsError: a tensor is missing, unknown or of another shape; only the causal masks are left out.
    """
    with meta_init():
        expected = _shapes(GPT(config))
    sources = {name: [_rename(name, _HFAILAB_GPT)] for name in expected}
    return _take(state_dict, expected, sources, ignored=r"blocks\.\d+\.mask$", model="HFAiLab GPT")


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _rename(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _taming_places(prefix: str, blocks: nn.Sequential, levels: Sequence[int]) -> dict[str, str]:
    """Our "encoder.down.5" -> their "encoder.down.2.block.1": one running index here, level and kind there."""
    places, level, count = {}, iter(levels), 0
    here = f"{prefix}.{next(level)}"
    for index, block in enumerate(blocks):
        ours = f"{prefix}.{index}"
        if isinstance(block, ResBlock):
            places[ours] = f"{here}.block.{count}"
            count += 1
        elif isinstance(block, AttnBlock):
            places[ours] = f"{here}.attn.{count - 1}"
        elif isinstance(block, Downsample | Upsample):
            places[ours] = f"{here}.{'downsample' if isinstance(block, Downsample) else 'upsample'}"
            here, count = f"{prefix}.{next(level)}", 0
    return places


def _taming_names(name: str, places: Mapping[str, str]) -> list[str]:
    match = re.match(r"(?:encoder\.down|decoder\.up)\.\d+", name)
    if match:
        name = places[match[0]] + name[match.end() :]
    name = _rename(name, _TAMING_VQGAN)
    return [name.replace(".qkv.", f".{part}.") for part in "qkv"] if ".qkv." in name else [name]


def _take(
    state_dict: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    sources: Mapping[str, Sequence[str]],
    ignored: str,
    model: str,
) -> dict[str, Tensor]:
    """Pick `sources[name]` for every expected name; several are stacked along their first dimension."""
    given = {name: tensor for name, tensor in state_dict.items() if not re.match(ignored, name)}
    shapes: dict[str, tuple[int, ...]] = {}
    for ours, names in sources.items():
        rows, *columns = expected[ours]
        for theirs in names:
            shapes[theirs] = (rows // len(names), *columns)
            if theirs in given and len(columns) == 1:
                given[theirs] = _as_matrix(given[theirs])
    check_fit(shapes, given, model)
    return {
        ours: given[names[0]] if len(names) == 1 else torch.cat([given[theirs] for theirs in names])
        for ours, names in sources.items()
    }


def _as_matrix(weight: Tensor) -> Tensor:
    """A 1x1 convolution (C, C', 1, 1) does what a matrix (C, C') does; anything else stays as it is."""
    return weight.flatten(1) if weight.shape[2:] == (1, 1) else weight
