"""Images -> tokens and embeddings, once, so that stage 2 reads no pixels.

Both encoders are frozen, so a picture's tokens and embedding never change during stage 2.
"""

from __future__ import annotations

from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor

from clipgen.clip import Clip
from clipgen.images import clip_from_pixels
from clipgen.vqgan import VQGAN
from train.common import save_tensors
from train.data import Images


@torch.no_grad()
def encode_images(
    data: Images, vqgan: VQGAN, clip: Clip, views: int, seed: int, device: torch.device, batch_size: int = 64
) -> tuple[Tensor, Tensor]:
    """Tokens (N * views, T) int32 and unit-norm embeddings (N * views, D) float16 of `views` random crops per image."""
    keys = [(i, seed + view) for view in range(views) for i in range(len(data))]
    vqgan, clip = vqgan.to(device).eval(), clip.to(device)
    tokens, embeddings = [], []
    for start in track(range(0, len(keys), batch_size), f"encoding {len(keys)} crops"):
        x = torch.stack([data[key] for key in keys[start : start + batch_size]]).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            embedding = clip.encode_image(clip_from_pixels(x, clip.image_size))
            # float32 distances: the nearest code must be the one that decoding will use.
            tokens.append(vqgan.tokens(x).int().cpu())
        embeddings.append(embedding.half().cpu())
    return torch.cat(tokens), torch.cat(embeddings)


def load_or_encode(
    cache: Path, data: Images, vqgan: VQGAN, clip: Clip, views: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`encode_images` through a file: computed at the first call, read afterwards.

    Returns:
        tokens (N * views, T) int64, embeddings (N * views, D) float32.
    """
    if not cache.is_file():
        tokens, embeddings = encode_images(data, vqgan, clip, views, seed, device)
        cache.parent.mkdir(parents=True, exist_ok=True)
        save_tensors({"tokens": tokens, "embeddings": embeddings}, cache)
    stored = load_file(cache)
    return stored["tokens"].long(), stored["embeddings"].float()
