"""The mini model's CLIP: OpenAI's architecture at a small size, and its training settings."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import cv2
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from clipgen.config import build
from clipgen.images.pixels import CLIP_MEAN, CLIP_STD
from clipgen.models.clip import OpenAIClip
from train.config import TrainConfig
from train.loop.script import minutes
from train.mini.labels import label
from train.mini.source import Scenes, all_scenes

EMBED_DIM = 384
CONTEXT = 32
VOCAB_SIZE = 16_384
"""The most common of OpenAI's 49,408 tokens; embeddings of all would be nearly half of CLIP's parameters."""
SIZE = 64
"""Side of the image tower's input, px."""


@dataclass
class TowerConfig(TrainConfig):
    """Settings of one tower's training."""

    steps: int = 8000
    batch_size: int = 64
    lr: float = 2e-3
    warmup: int = 200
    ema: float = 0.997
    weight_decay: float = 0.05
    held_out: int = 512
    sample_every: int = 250
    save_every: int = 100


def build_clip() -> OpenAIClip:
    """An untrained CLIP: 7 M parameters in the image tower, 3 M for text, 2 M of them token embeddings."""
    return OpenAIClip(
        embed_dim=EMBED_DIM,
        image_resolution=SIZE,
        vision_layers=(2, 2, 2, 2),
        vision_width=32,
        vision_patch_size=None,
        context_length=CONTEXT,
        vocab_size=VOCAB_SIZE,
        transformer_width=128,
        transformer_heads=2,
        transformer_layers=4,
    )


def parse_tower(doc: str, **defaults: object) -> tuple[argparse.Namespace, TowerConfig]:
    """Parse the command line of a tower's script, with overrides of its settings such as steps=500.

    Raises:
        ConfigError: a setting is unknown or out of range.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/emoji", help="the folder that `make renders` writes to")
    parser.add_argument("--out", type=Path, default=Path("runs/clip"), help="folder of both towers")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="WordNet's database")
    parser.add_argument("--minutes", type=minutes, help="save and stop after this time; the same command resumes")
    parser.add_argument("overrides", nargs="*", help="changes to the settings, such as steps=500")
    args = parser.parse_intermixed_args()
    pairs = dict(text.partition("=")[::2] for text in args.overrides)
    return args, build(TowerConfig, {**defaults, **pairs}, "settings")


class LabelledScenes(Dataset[tuple[Tensor, Tensor]]):
    """Scenes by number, at the image tower's size, with their labels."""

    def __init__(self, scenes: Scenes) -> None:
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Pixels uint8 (3, SIZE, SIZE), and a class label for each head."""
        image = cv2.resize(self.scenes.image(index), (SIZE, SIZE), interpolation=cv2.INTER_AREA)
        pixels = torch.from_numpy(image).permute(2, 0, 1).contiguous()
        return pixels, self.labels(index)

    def labels(self, index: int) -> Tensor:
        """Class label for each head, (heads,)."""
        return torch.tensor(label(self.scenes.facts(index)))

    def batch(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Pixels and labels of several scenes: (B, 3, SIZE, SIZE) and (B, heads)."""
        pixels, labels = zip(*(self[row] for row in rows), strict=True)
        return torch.stack(pixels), torch.stack(labels)


def open_scenes(data: str) -> LabelledScenes:
    """Scenes of all combinations; like a large pretrained CLIP, this one is not limited to a subset."""
    return LabelledScenes(all_scenes(data))


def normalise(pixels: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> CLIP-normalised float32 on the same device, channels last."""
    mean, std = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return ((pixels.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def embed(tower: torch.nn.Module, pixels: Tensor) -> Tensor:
    """Unit-norm embeddings (B, D) float32 of uint8 pixels (B, 3, SIZE, SIZE)."""
    return F.normalize(tower(normalise(pixels)).float(), dim=-1)
