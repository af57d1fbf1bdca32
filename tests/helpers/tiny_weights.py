"""A complete model with random weights, small enough to be made in a moment."""

from __future__ import annotations

from pathlib import Path

import torch

from clipgen.config import ModelConfig
from clipgen.models.clip import OpenAIClip
from clipgen.models.gpt import GPT
from clipgen.models.vqgan import VQGAN
from clipgen.weights.model_dir import save_model_dir


def write_tiny_weights(folder: Path, config: ModelConfig) -> Path:
    """Write a folder of weights drawn from a fixed seed, with a tiny CLIP. Returns the folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = OpenAIClip(
            embed_dim=32,
            image_resolution=32,
            vision_layers=2,
            vision_width=64,
            vision_patch_size=8,
            context_length=16,
            vocab_size=49408,
            transformer_width=64,
            transformer_heads=1,
            transformer_layers=2,
        )
        vqgan, gpt = VQGAN(config.vqgan), GPT(config.gpt)
    with torch.no_grad():  # an untrained decoder paints grey and an untrained GPT hardly listens: make both vivid
        vqgan.decoder.conv_out.weight.mul_(4)
        gpt.head.weight.mul_(20)
    parts = {"clip": clip.state_dict(), "vqgan": vqgan.state_dict(), "gpt": gpt.state_dict()}
    return save_model_dir(folder, config, parts)
