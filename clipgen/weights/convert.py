"""Convert published checkpoints: HFAiLab's CLIP-GEN (release v0.1.0), CompVis' VQGAN, OpenAI's CLIP.

Each `map_*` function looks up, for every tensor of our network, its source in the published state dict and checks its
shape. Whatever remains must be training state that is known by name. Nothing is copied, except that CompVis'
attention weights q, k and v are joined into one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from clipgen.config import GPTConfig, ModelConfig, VQGANConfig, load_preset
from clipgen.errors import WeightsError
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
_TAMING_VQGAN: Rules = (  # after those of `_taming_levels`
    (r"\.level\.", "."),
    (r"^quantizer\.", "quantize."),
    (r"\.mid\.0\.", ".mid.block_1."),
    (r"\.mid\.1\.", ".mid.attn_1."),
    (r"\.mid\.2\.", ".mid.block_2."),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"\.proj\.", ".proj_out."),
    (r"\.qkv\.", ".*."),  # three tensors there: q, k and v
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
        ConfigError: no such configuration, or a value in it is wrong.
        WeightsError: a file cannot be read; a tensor is missing, unknown or of another shape; or the three files do
            not belong together. Nothing is written then.
    """
    model = load_preset(config)
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

    HFAiLab's is the "model" entry of `vqgan_coco.pt`, CompVis' the "state_dict" entry of its Lightning checkpoint.
    Their discriminators and perceptual networks are dropped.

    Raises:
        WeightsError: a tensor is missing, unknown or of another shape.
    """
    with meta_init():
        model = VQGAN(config)
    if "quantize.embedding.weight" in state_dict:
        return _take(state_dict, model, "CompVis VQGAN", [*_taming_levels(model), *_TAMING_VQGAN], ignored=r"loss\.")
    if "decoder.quant_conv_in.weight" in state_dict:
        return _take(state_dict, model, "HFAiLab VQGAN", _HFAILAB_VQGAN, ignored=r"discriminator\.")
    return _take(state_dict, model, "VQGAN")


def map_gpt(state_dict: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Map HFAiLab's GPT (the "model" entry of `gpt_coco.pt`, less its causal masks) or ours to one of `GPT(config)`.

    Raises:
        WeightsError: a tensor is missing, unknown or of another shape.
    """
    with meta_init():
        model = GPT(config)
    if any(name.startswith("blocks.0.encoder.") for name in state_dict):
        return _take(state_dict, model, "HFAiLab GPT", _HFAILAB_GPT, ignored=r"blocks\.\d+\.mask$")
    return _take(state_dict, model, "GPT")


def _rename(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _taming_levels(model: VQGAN) -> Iterator[tuple[str, str]]:
    """Rules such as "encoder.down.5." -> "encoder.down.level.2.block.1.": we count blocks, they levels and kinds."""
    levels = range(len(model.config.ch_mult))
    for side, blocks, order in (
        ("encoder.down", model.encoder.down, iter(levels)),
        ("decoder.up", model.decoder.up, reversed(levels)),
    ):
        theirs, count = f"{side}.level.{next(order)}", 0
        for index, block in enumerate(blocks):
            ours = rf"^{re.escape(side)}\.{index}\."
            if isinstance(block, ResBlock):
                yield ours, f"{theirs}.block.{count}."
                count += 1
            elif isinstance(block, AttnBlock):
                yield ours, f"{theirs}.attn.{count - 1}."
            elif isinstance(block, Downsample | Upsample):
                yield ours, f"{theirs}.{'downsample' if isinstance(block, Downsample) else 'upsample'}."
                theirs, count = f"{side}.level.{next(order)}", 0


def _take(
    state_dict: Mapping[str, Tensor], model: nn.Module, whose: str, rules: Rules = (), ignored: str = r"(?!)"
) -> dict[str, Tensor]:
    """Pick the tensors that `rules` name for those of `model`; q, k and v are joined where they are three."""
    given = {name: tensor for name, tensor in state_dict.items() if not re.match(ignored, name)}
    sources: dict[str, list[str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for ours, tensor in model.state_dict().items():
        name = _rename(ours, rules)
        sources[ours] = [name.replace("*", part) for part in "qkv"] if "*" in name else [name]
        rows, *columns = tensor.shape
        for theirs in sources[ours]:
            shapes[theirs] = (rows // len(sources[ours]), *columns)
            if theirs in given and len(columns) == 1 and given[theirs].shape[2:] == (1, 1):
                given[theirs] = given[theirs].flatten(1)  # a 1x1 convolution (C, C', 1, 1) as a matrix (C, C')
    check_shapes(shapes, given, whose)
    return {
        ours: given[names[0]] if len(names) == 1 else torch.cat([given[theirs] for theirs in names])
        for ours, names in sources.items()
    }
