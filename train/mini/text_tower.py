"""Train the text tower of the mini CLIP on the frozen image tower, and join both in one file.

    python -m train.mini.text_tower --data data/emoji --out runs/clip [--wordnet DIR] [--minutes 9] [steps=500 ...]

The image tower of `train/mini/image_tower.py` and its heads are frozen. A sentence's target is the embedding of the
scene that it describes, and the heads must predict the scene's facts from it. Each time, a scene is described in
different words, some of them from WordNet. Writes OUT/clip.safetensors, an ordinary CLIP checkpoint.
"""

from __future__ import annotations

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

import random
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clipgen.models.clip import OpenAIClip, tokenize
from clipgen.utils.files import replacing, sha256
from train.loop.batches import build_accelerator, process_rows, step_generator
from train.loop.checkpoint import Checkpoints, in_half, save_tensors
from train.loop.health import check_finite
from train.loop.logger import Logger
from train.loop.optimization import MovingAverage, cosine_schedule, load_model_weights, set_lr, weight_decay_groups
from train.loop.output import lock_output
from train.loop.script import command
from train.loop.stopping import Stop
from train.mini.describe import Words, describe
from train.mini.labels import Heads, accuracy, heads_loss
from train.mini.objects import read_objects
from train.mini.towers import (
    CONTEXT,
    EMBED_DIM,
    VOCAB_SIZE,
    LabelledScenes,
    TowerConfig,
    build_clip,
    embed,
    open_scenes,
    parse_tower,
)
from train.mini.wordnet import narrower_words

POOL = 60_000
"""Scenes that are embedded once and described many times."""
_ALIGNMENT, _READING = 5.0, 0.3
"""Weights of the distance to the scene's embedding, and of the heads' loss."""


def encode_tokens(model: OpenAIClip, tokens: Tensor) -> Tensor:
    """The text tower on tokens (B, L), L at most its context: unit-norm embeddings (B, D).

    `CLIP.encode_text` needs the image tower for its dtype, which is missing while the text tower trains alone.
    """
    length = tokens.shape[1]
    x = (model.token_embedding(tokens) + model.positional_embedding[:length]).permute(1, 0, 2)  # (L, B, C)
    x = model.ln_final(model.transformer(x).permute(1, 0, 2))
    x = x[torch.arange(len(x), device=x.device), tokens.argmax(-1)] @ model.text_projection
    return F.normalize(x.float(), dim=-1)


@torch.no_grad()
def embed_pool(weights: Path, scenes: LabelledScenes, count: int, cache: Path, device: torch.device) -> Tensor:
    """Embeddings (count, D) of the first scenes, on the CPU, computed once and kept in `cache`.

    Args:
        weights: file of the image tower; for other weights they are computed again.
    """
    key = f"{sha256(weights)} {scenes.scenes.fingerprint()} {count}"
    if cache.is_file():
        with safe_open(cache, "pt") as file:
            if (file.metadata() or {}).get("key") == key:
                return file.get_tensor("embeddings").float()
    tower = build_clip().visual.eval()
    load_model_weights(tower, weights)
    tower.to(device, memory_format=torch.channels_last)
    parts = []
    for first in track(range(0, count, 128), f"embedding {count} scenes"):
        pixels, _ = scenes.batch(list(range(first, min(count, first + 128))))
        parts.append(embed(tower, pixels.to(device)).cpu())
    found = torch.cat(parts)
    with replacing(cache) as temporary:
        save_file({"embeddings": found.half()}, temporary, {"key": key})
    return found


def describe_rows(scenes: LabelledScenes, rows: list[int], words: Words, seed: int) -> tuple[Tensor, Tensor]:
    """A sentence for each scene: tokens (B, L), and its labels (B, heads)."""
    rng = random.Random(seed)
    texts = [describe(scenes.scenes.facts(row), rng, words) for row in rows]
    tokens, _ = tokenize(texts, CONTEXT, VOCAB_SIZE)
    return tokens[:, : int(tokens.argmax(1).max()) + 1], torch.stack([scenes.labels(row) for row in rows])


@command
def main() -> None:
    args, config = parse_tower(__doc__ or "", steps=6000, batch_size=256, lr=1.5e-3, warmup=100)
    with lock_output(args.out):
        train(args, config)


def train(args: Namespace, config: TowerConfig) -> None:
    """Train a text tower to the last step, or until stopped."""
    accelerator = build_accelerator(config)
    device, is_main = accelerator.device, accelerator.is_main_process
    scenes = open_scenes(args.data)
    words = narrower_words(args.wordnet, read_objects().values())

    model = build_clip().train()
    model.visual = nn.Identity()
    heads = Heads(EMBED_DIM).requires_grad_(False).to(device)
    load_model_weights(heads, args.out / "heads.safetensors")
    count, cache = min(POOL, 20 * config.steps), args.out / "pool.safetensors"
    with accelerator.main_process_first():
        pool = embed_pool(args.out / "image.safetensors", scenes, count, cache, device)

    if config.init:
        load_model_weights(model, config.init)
    optimizer = torch.optim.AdamW(
        weight_decay_groups(model, config.weight_decay), config.lr, betas=(0.9, 0.98), fused=True
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    text = cast(OpenAIClip, accelerator.unwrap_model(model))
    ema = MovingAverage(text, config.ema)
    average = cast(OpenAIClip, ema.module)
    accelerator.register_for_checkpointing(ema)
    out = args.out / "text"
    checkpoints = Checkpoints(accelerator, out, config.keep, {"batch_size": config.batch_size}, asdict(config))
    start = checkpoints.load()
    part = process_rows(accelerator, config.batch_size)
    held = list(range(min(config.held_out, len(pool) // 20)))
    log = Logger(out, config.steps, config.batch_size, start) if is_main else None
    factor = cosine_schedule(config)

    with Stop(args.minutes) as stop:
        for step in range(start, config.steps):
            chosen = torch.randint(len(held), len(pool), (config.batch_size,), generator=step_generator(config, step))[
                part
            ]
            tokens, labels = describe_rows(scenes, chosen.tolist(), words, config.seed + step)
            target = pool[chosen].to(device)
            set_lr(optimizer, config.lr * factor(step))
            with accelerator.autocast():
                found = encode_tokens(text, tokens.to(device))
            alignment = 1 - (found * target).sum(-1).mean()
            reading = heads_loss(heads(found), labels.to(device))
            optimizer.zero_grad()
            accelerator.backward(_ALIGNMENT * alignment + _READING * reading)
            accelerator.clip_grad_norm_(model.parameters(), config.grad_clip)
            optimizer.step()
            ema.update_parameters(text)

            done = step + 1
            stopping = stop.requested()
            if log is not None and (done % config.log_every == 0 or done == config.steps):
                line: dict[str, float | Tensor] = {"alignment": alignment.detach(), "reading": reading.detach()}
                check_finite(done, line)
                if done % config.sample_every == 0 or done == config.steps:
                    with torch.no_grad():
                        tokens, labels = describe_rows(scenes, held, words, 0)
                        found = encode_tokens(average, tokens.to(device))
                        line["held_cosine"] = (found.cpu() * pool[held]).sum(-1).mean()
                        line |= accuracy(heads(found), labels.to(device))
                log.scalars(done, line)
            if done % config.save_every == 0 or done == config.steps or stopping:
                if is_main:
                    save_tensors(average.state_dict(), args.out / "text.safetensors")
                    save_clip(average.state_dict(), args.out)
                checkpoints.save(done)
            if stopping:
                stop.leave(f"step {done} of {config.steps} is saved in {out}")


def save_clip(text: Mapping[str, Tensor], out: Path) -> None:
    """Join the text tower and OUT/image.safetensors in OUT/clip.safetensors, in float16, under OpenAI's names."""
    weights = dict(text) | {f"visual.{name}": tensor for name, tensor in load_file(out / "image.safetensors").items()}
    save_tensors(in_half(weights), out / "clip.safetensors")


def split_clip(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Undo `save_clip`: the tensors of the "image" and the "text" tower."""
    image = {name.removeprefix("visual."): t for name, t in weights.items() if name.startswith("visual.")}
    return {"image": image, "text": {name: t for name, t in weights.items() if not name.startswith("visual.")}}


if __name__ == "__main__":
    main()
