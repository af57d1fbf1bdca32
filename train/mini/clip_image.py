"""The mini CLIP's image tower: a small ResNet that tells what a picture shows, in which style, on what colour.

    python train/mini/clip_image.py --data data/emoji --out runs/clip

Every emoji has a learned prototype on the sphere, at first where the sentence encoder puts its name, so that kinds of
things stay neighbours; a picture must lie nearest to the prototypes of its objects among all of them (a cosine
softmax, as in NormFace, arXiv 1704.06369). Two linear heads read the style and the background colour from the same
embedding, so that it keeps both. `train/mini/clip_text.py` then teaches sentences where their pictures are.
"""

from __future__ import annotations

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from train.loop.arguments import at_least
from train.loop.batches import build_accelerator
from train.loop.checkpoint import Checkpoints, save_tensors
from train.loop.health import check_finite
from train.loop.logger import Logger
from train.loop.optimization import MovingAverage, cosine_schedule, weight_decay_groups
from train.loop.script import command
from train.mini.captions import COLOURS, STYLES
from train.mini.clip_data import (
    EMBED_DIM,
    SCALE,
    TowerConfig,
    augment,
    build_mini_clip,
    name_embeddings,
    normalise,
    read_codes,
    read_pixels,
    recall,
)
from train.mini.words import read_emoji, read_records


class Heads(nn.Module):
    """Logits of objects, styles and background colours from embeddings; used in training only."""

    def __init__(self, names: Tensor) -> None:
        """Start the prototypes at the names' embeddings (C, D)."""
        super().__init__()
        self.prototypes = nn.Parameter(names.clone())
        self.style = nn.Linear(EMBED_DIM, len(STYLES))
        self.background = nn.Linear(EMBED_DIM, len(COLOURS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit-norm embeddings (B, D) -> logits (B, C), (B, styles), (B, colours)."""
        objects = SCALE * x @ F.normalize(self.prototypes, dim=-1).t()
        return objects, self.style(SCALE * x), self.background(SCALE * x)


def heads_loss(logits: tuple[Tensor, Tensor, Tensor], labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropies of object, style and background; labels (B, 4): first and last object, style, background."""
    objects, style, background = logits
    what = 0.5 * (F.cross_entropy(objects, labels[:, 0]) + F.cross_entropy(objects, labels[:, 1]))
    return what, F.cross_entropy(style, labels[:, 2]), F.cross_entropy(background, labels[:, 3])


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="what `train.mini.emoji` wrote")
    parser.add_argument("--out", type=Path, default=Path("runs/clip"))
    parser.add_argument("--steps", type=at_least(1), default=3500, help="training steps")
    args = parser.parse_args()
    config = TowerConfig(steps=args.steps, lr=2e-3, warmup=200)
    accelerator = build_accelerator(config)
    device = accelerator.device

    emoji = read_emoji(args.data)
    records = read_records(args.data / "train")
    present = sorted({code for r in records for code in r["objects"]})
    number = {code: i for i, code in enumerate(present)}
    styles, colours = list(STYLES), list(COLOURS)
    ends = torch.tensor([[number[r["objects"][0]], number[r["objects"][-1]]] for r in records])
    looks = torch.tensor([[styles.index(r["style"]), colours.index(r["background"])] for r in records])
    labels = torch.cat([ends, looks], dim=1)
    pixels = read_pixels(args.data / "train")  # (N, 3, 64, 64) uint8: small enough to hold
    held_pixels, held_codes = read_pixels(args.data / "heldout"), read_codes(args.data / "heldout")

    tower = build_mini_clip().visual.train().to(memory_format=torch.channels_last)  # a third faster on a CPU
    heads = Heads(name_embeddings([emoji[code] for code in present], args.out / "teacher_names.safetensors"))
    groups = [
        *weight_decay_groups(tower, config.weight_decay),
        {"params": list(heads.parameters()), "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, config.lr, fused=True)
    schedule = LambdaLR(optimizer, cosine_schedule(config))
    tower, heads, optimizer, schedule = accelerator.prepare(tower, heads, optimizer, schedule)
    ema = MovingAverage(accelerator.unwrap_model(tower), config.ema)
    accelerator.register_for_checkpointing(ema)
    out = args.out / "image"
    checkpoints = Checkpoints(accelerator, out, config.keep, about=asdict(config))
    start = checkpoints.load()
    log = Logger(out, config.steps, config.batch_size)

    for step in range(start, config.steps):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        rows = torch.randint(len(pixels), (config.batch_size,), generator=generator)
        x = normalise(augment(pixels[rows], generator)).to(device, memory_format=torch.channels_last)
        with accelerator.autocast():
            embedding = tower(x)
        embedding = F.normalize(embedding.float(), dim=-1)
        what, style, background = heads_loss(heads(embedding), labels[rows].to(device))
        optimizer.zero_grad()
        accelerator.backward(what + 0.3 * (style + background))
        accelerator.clip_grad_norm_(tower.parameters(), config.grad_clip)
        optimizer.step()
        schedule.step()
        ema.update_parameters(accelerator.unwrap_model(tower))

        done = step + 1
        if done % config.log_every == 0:
            scalars: dict[str, float | Tensor] = {"objects": what.detach(), "style": style.detach()}
            scalars["background"] = background.detach()
            if done % config.sample_every == 0:
                with torch.no_grad():
                    found = F.normalize(ema.module(normalise(held_pixels).to(device)).float(), dim=-1)
                    prototypes = F.normalize(accelerator.unwrap_model(heads).prototypes, dim=-1)
                scalars |= recall(prototypes.cpu(), found.cpu(), present, held_codes)
            log.scalars(done, scalars)
            check_finite(done, scalars)
        if done % config.save_every == 0 or done == config.steps:
            checkpoints.save(done)
            save_tensors(ema.module.state_dict(), args.out / "image.safetensors")


if __name__ == "__main__":
    main()
