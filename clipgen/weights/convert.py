"""Convert published checkpoints: HFAiLab's CLIP-GEN (release v0.1.0), CompVis' VQGAN, OpenAI's CLIP.

Each `map_*` function looks up, for every tensor of our network, its source in the published state dict and checks its
shape. Whatever remains must be training state that is known by name. Nothing is copied, except that CompVis'
attention weights q, k and v are joined into one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipgen.config import GPTConfig, ModelConfig, VQGANConfig, load_preset
from clipgen.errors import ConfigError, WeightsError
from clipgen.models.clip import Clip
from clipgen.models.gpt import GPT
from clipgen.models.meta_init import meta_init
from clipgen.models.vqgan import VQGAN, AttnBlock, Downsample, ResBlock, Upsample
from clipgen.weights.checkpoint_reader import read_tensors
from clipgen.weights.model_dir import check_shapes, save_model_dir

Rules = Sequence[tuple[str, str]]

# Our names -> theirs: patterns, applied one after another.
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


def convert_checkpoints(clip: Path, vqgan: Path, gpt: Path, out: Path, config: str = "coco") -> Path:
    """Write a model folder from published checkpoints, in the precision they are stored in.

    Nothing in the files is executed; `read_tensors` says which formats can be read.

    Args:
        clip: OpenAI's TorchScript archive, HFAiLab's state dict, or .safetensors with OpenAI's names.
        vqgan: HFAiLab's or CompVis' checkpoint, or .safetensors from stage 1.
        gpt: HFAiLab's checkpoint, or .safetensors from stage 2.
        out: created if needed; complete once its manifest exists.
        config: the model they belong to: a name ("coco", "imagenet") or the path of a .yaml file.

    Returns:
        `out`.

    Raises:
        WeightsError: a file cannot be read; a tensor is missing, unknown or of another shape; or the three files do
            not belong together. Nothing is written then.
    """
    try:
        model = load_preset(config)
    except ConfigError as error:
        raise WeightsError(str(error)) from error
    parts = convert_parts({"clip": clip, "vqgan": vqgan, "gpt": gpt}, model)
    embed_dim = parts["clip"]["text_projection"].shape[1]
    if embed_dim != model.gpt.n_cond:
        raise WeightsError(
            f"{clip} embeds in {embed_dim} dimensions, but gpt.n_cond of {config} is {model.gpt.n_cond}; "
            "use the CLIP that the GPT was trained with"
        )
    return save_model_dir(out, model, parts)


def convert_parts(paths: Mapping[str, Path], config: ModelConfig) -> dict[str, dict[str, Tensor]]:
    """Read any of "clip", "vqgan" and "gpt" from published checkpoints, under our names; nothing is written.

    Raises:
        WeightsError: a file cannot be read, or a tensor is missing, unknown or of another shape.
    """
    mappings: dict[str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] = {
        "clip": map_clip,
        "vqgan": lambda tensors: map_vqgan(tensors, config.vqgan),
        "gpt": lambda tensors: map_gpt(tensors, config.gpt),
    }
    parts = {}
    for part, path in paths.items():
        tensors = read_tensors(path)
        try:
            parts[part] = mappings[part](tensors)
        except WeightsError as error:
            raise WeightsError(f"{path}: {error}") from error
    return parts


def map_clip(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Check a CLIP, whose names are OpenAI's everywhere; drop the sizes and masks that OpenAI's program stores.

    Raises:
        WeightsError: a tensor is missing, unknown or of a shape that does not fit the others.
    """
    weights = {name: tensor for name, tensor in state_dict.items() if not re.fullmatch(_CLIP_STATE, name)}
    Clip.from_state_dict({name: torch.empty_like(tensor, device="meta") for name, tensor in weights.items()}, "meta")
    return weights


_CLIP_STATE = r"input_resolution|context_length|vocab_size|(visual\.)?transformer\.resblocks\.\d+\.attn_mask"


def map_vqgan(state_dict: Mapping[str, Tensor], config: VQGANConfig) -> dict[str, Tensor]:
    """Map a VQGAN of HFAiLab, CompVis or ours, recognised by its names, to a state dict of `VQGAN(config)`.

    Raises:
        WeightsError: a tensor is missing, unknown or of another shape.
    """
    if "quantize.embedding.weight" in state_dict:
        return map_taming_vqgan(state_dict, config)
    if "decoder.quant_conv_in.weight" in state_dict:
        return map_hfailab_vqgan(state_dict, config)
    expected = _expected_shapes(VQGAN, config)
    check_shapes(expected, state_dict, "VQGAN")
    return dict(state_dict)


def map_gpt(state_dict: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Map a GPT of HFAiLab or ours, recognised by its names, to a state dict of `GPT(config)`.

    Raises:
        WeightsError: a tensor is missing, unknown or of another shape.
    """
    if any(name.startswith("blocks.0.encoder.") for name in state_dict):
        return map_hfailab_gpt(state_dict, config)
    expected = _expected_shapes(GPT, config)
    check_shapes(expected, state_dict, "GPT")
    return dict(state_dict)


def map_hfailab_vqgan(state_dict: Mapping[str, Tensor], config: VQGANConfig) -> dict[str, Tensor]:
    """Map HFAiLab's VQGAN (the "model" entry of `vqgan_coco.pt`) to a state dict of `VQGAN(config)`.

    The discriminator is dropped.

    Raises:
        WeightsError: a tensor is missing, unknown or of another shape.
    """
    expected = _expected_shapes(VQGAN, config)
    sources = {name: [_rename(name, _HFAILAB_VQGAN)] for name in expected}
    return _take(state_dict, expected, sources, ignored=r"discriminator\.", model="HFAiLab VQGAN")


def map_taming_vqgan(state_dict: Mapping[str, Tensor], config: VQGANConfig) -> dict[str, Tensor]:
    """Map CompVis' VQGAN (the "state_dict" entry of its Lightning checkpoint) to a state dict of `VQGAN(config)`.

    `loss.*`, the discriminator and the perceptual network, is dropped.

    Raises:
        WeightsError: a tensor is missing, unknown or of another shape.
    """
    with meta_init():
        model = VQGAN(config)
    levels = len(config.ch_mult)
    prefixes = _taming_prefixes("encoder.down", model.encoder.down, range(levels))
    prefixes |= _taming_prefixes("decoder.up", model.decoder.up, range(levels - 1, -1, -1))
    expected = _expected_shapes(VQGAN, config)
    sources = {name: _taming_names(name, prefixes) for name in expected}
    return _take(state_dict, expected, sources, ignored=r"loss\.", model="CompVis VQGAN")


def map_hfailab_gpt(state_dict: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Map HFAiLab's GPT (the "model" entry of `gpt_coco.pt`) to a state dict of `GPT(config)`.

    The causal masks are dropped.

    Raises:
        WeightsError: a tensor is missing, unknown or of another shape.
    """
    expected = _expected_shapes(GPT, config)
    sources = {name: [_rename(name, _HFAILAB_GPT)] for name in expected}
    return _take(state_dict, expected, sources, ignored=r"blocks\.\d+\.mask$", model="HFAiLab GPT")


def _expected_shapes(kind: Callable[[Any], nn.Module], config: Any) -> dict[str, tuple[int, ...]]:
    with meta_init():
        return {name: tuple(tensor.shape) for name, tensor in kind(config).state_dict().items()}


def _rename(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _taming_prefixes(prefix: str, blocks: nn.Sequential, levels: Sequence[int]) -> dict[str, str]:
    """Our "encoder.down.5" -> their "encoder.down.2.block.1": we count blocks, they count levels and kinds."""
    prefixes, level, count = {}, iter(levels), 0
    theirs = f"{prefix}.{next(level)}"
    for index, block in enumerate(blocks):
        ours = f"{prefix}.{index}"
        if isinstance(block, ResBlock):
            prefixes[ours] = f"{theirs}.block.{count}"
            count += 1
        elif isinstance(block, AttnBlock):
            prefixes[ours] = f"{theirs}.attn.{count - 1}"
        elif isinstance(block, Downsample | Upsample):
            prefixes[ours] = f"{theirs}.{'downsample' if isinstance(block, Downsample) else 'upsample'}"
            theirs, count = f"{prefix}.{next(level)}", 0
    return prefixes


def _taming_names(name: str, prefixes: Mapping[str, str]) -> list[str]:
    match = re.match(r"(?:encoder\.down|decoder\.up)\.\d+", name)
    if match:
        name = prefixes[match[0]] + name[match.end() :]
    name = _rename(name, _TAMING_VQGAN)
    return [name.replace(".qkv.", f".{part}.") for part in "qkv"] if ".qkv." in name else [name]


def _take(
    state_dict: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    sources: Mapping[str, Sequence[str]],
    ignored: str,
    model: str,
) -> dict[str, Tensor]:
    """Pick the tensors `sources[name]` for every expected name; several are joined along their first dimension."""
    given = {name: tensor for name, tensor in state_dict.items() if not re.match(ignored, name)}
    shapes: dict[str, tuple[int, ...]] = {}
    for ours, names in sources.items():
        rows, *columns = expected[ours]
        for theirs in names:
            shapes[theirs] = (rows // len(names), *columns)
            if theirs in given and len(columns) == 1:
                given[theirs] = _as_matrix(given[theirs])
    check_shapes(shapes, given, model)
    return {
        ours: given[names[0]] if len(names) == 1 else torch.cat([given[theirs] for theirs in names])
        for ours, names in sources.items()
    }


def _as_matrix(weight: Tensor) -> Tensor:
    """Turn the weight of a 1x1 convolution (C, C', 1, 1) into a matrix (C, C'); leave anything else as it is."""
    return weight.flatten(1) if weight.shape[2:] == (1, 1) else weight
