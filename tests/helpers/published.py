"""Checkpoints in the formats of their publishers, made from the golden models, for tests of conversion and reading."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from clipgen import ClipGen
from clipgen.config import GPTConfig, ModelConfig, VQGANConfig
from clipgen.models.clip import Clip, OpenAIClip
from clipgen.models.gpt import GPT
from clipgen.models.vqgan import VQGAN
from clipgen.weights import convert
from clipgen.weights.convert import convert_checkpoints
from train.config import Config

TINY = {"image_size": 32, "ch": 32, "ch_mult": [1, 1, 2], "num_res_blocks": 1, "attn_resolutions": [8]}
HFAILAB = VQGANConfig(**TINY, z_channels=32, embed_dim=32, codebook_size=64, beta=0.2, norm_eps=1e-5)
TAMING = VQGANConfig(**TINY, z_channels=32, embed_dim=24, codebook_size=64, beta=0.25, norm_eps=1e-6)


@dataclass
class Source:
    """Files in their publishers' formats, and the configuration they belong to."""

    clip: Path
    vqgan: Path
    gpt: Path
    config: str

    def convert(self, out: Path) -> ClipGen:
        """Convert with the function of the command and load the result as a pipeline."""
        folder = convert_checkpoints(self.clip, self.vqgan, self.gpt, out, self.config)
        return ClipGen.from_pretrained(folder, device="cpu", dtype="float32")


def original(golden: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A reference model's own state dict, and its inputs and outputs."""
    tensors = load_file(golden / f"{name}.safetensors")
    parts = ({k.split(".", 1)[1]: t for k, t in tensors.items() if k.startswith(p)} for p in ("model.", "io."))
    return next(parts), next(parts)


def tiny_clip(embed_dim: int) -> OpenAIClip:
    return OpenAIClip(embed_dim, 32, 1, 64, 8, 77, 49408, 64, 1, 1).eval()


def hfailab_names(model: GPT | VQGAN) -> dict[str, Tensor]:
    """Random weights under HFAiLab's names, with the training state that its files contain."""
    rules = convert._HFAILAB_GPT if isinstance(model, GPT) else convert._HFAILAB_VQGAN
    state = {convert._rename(name, rules): tensor for name, tensor in model.state_dict().items()}
    extra = "blocks.0.mask" if isinstance(model, GPT) else "discriminator.main.0.weight"
    return state | {extra: torch.ones(2, 2, dtype=torch.bool)}


def written(
    folder: Path, clip: dict[str, Tensor], vqgan: dict[str, Tensor], gpt: dict[str, Tensor], config: ModelConfig
) -> Source:
    """Write files as in release v0.1.0: CLIP bare, the others under "model" beside an optimizer's state."""
    source = Source(folder / "clip.pt", folder / "vqgan.pt", folder / "gpt.pt", str(folder / "config.yaml"))
    state = {"epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(5)}}, "param_groups": [{"lr": 1e-4}]}}
    torch.save(clip, source.clip)
    torch.save({"model": vqgan, **state}, source.vqgan)
    torch.save({"model": gpt, **state}, source.gpt)
    OmegaConf.save(OmegaConf.structured(Config(model=config)), source.config)
    return source


def write_hfailab(golden: Path, folder: Path) -> Source:
    """Write the golden CLIP and VQGAN, and a GPT that fits them."""
    config = ModelConfig("tiny", HFAILAB, GPTConfig(1, 2, 32, vocab_size=64, block_size=64, n_cond=32))
    clip, vqgan = (original(golden, name)[0] for name in ("hfailab_clip_tiny", "hfailab_vqgan_tiny"))
    return written(folder, clip, vqgan, hfailab_names(GPT(config.gpt)), config)


def write_torchscript(golden: Path, path: Path) -> Path:
    """Write the golden CLIP in OpenAI's format: a traced program whose sizes are buffers."""
    model = Clip.from_state_dict(original(golden, "hfailab_clip_tiny")[0]).model
    for name, value in {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}.items():
        vars(model).pop(name, None)  # a plain attribute in the class, a buffer in the archive
        model.register_buffer(name, torch.tensor(value))
    tokens = torch.zeros(1, 77, dtype=torch.long)
    with warnings.catch_warnings():  # TorchScript is on its way out, and OpenAI's file is what it is
        warnings.simplefilter("ignore")
        torch.jit.trace(model, (torch.zeros(1, 3, 32, 32), tokens), check_trace=False).save(str(path))
    return path
