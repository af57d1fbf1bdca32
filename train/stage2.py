"""Stage 2: images -> GPT, which learns an image's tokens given its CLIP embedding. No captions.

    python train/stage2.py --config mini --data data/emoji/stage2 --vqgan runs/vqgan \\
        --clip runs/clip/clip.safetensors --out runs/gpt

Run it again to resume. The weights are in OUT/gpt.safetensors (the moving average), the curves in OUT/scalars.csv and
OUT/tensorboard, samples (above: the pictures whose embeddings they were drawn from) in OUT/samples_*.png. Tokens and
embeddings are computed once and kept in OUT/encoded.safetensors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from clipgen.clip import Clip
from clipgen.config import SamplingConfig
from clipgen.gpt import GPT
from clipgen.images import from_pixels, grid
from clipgen.sampling import generate_tokens
from clipgen.vqgan import VQGAN
from train.common import (
    Logger,
    build_accelerator,
    build_ema,
    build_optimizers,
    command,
    cosine,
    init_weights,
    load_checkpoint,
    parse_args,
    save_checkpoint,
    save_tensors,
)
from train.data import Images, Shuffle
from train.encode import load_or_encode


@command
def main() -> None:
    args, config = parse_args(
        __doc__ or "", vqgan="folder of stage 1, with vqgan.safetensors", clip="CLIP weights, .safetensors"
    )
    c = config.stage2
    accelerator = build_accelerator(c)
    device = accelerator.device

    vqgan = VQGAN(config.model.vqgan).requires_grad_(False).eval()
    vqgan.load_state_dict(load_file(args.vqgan / "vqgan.safetensors"))
    clip = Clip.from_state_dict(load_file(args.clip))
    data = Images(args.data, config.model.vqgan.image_size, c.min_scale, flip=c.views > 1)
    with accelerator.main_process_first():
        tokens, embeddings = load_or_encode(
            args.out / "encoded.safetensors", data, vqgan, clip, c.views, c.seed, device
        )
    # A twentieth, spread over the set, is never trained on.
    held = torch.linspace(0, len(tokens) - 1, max(1, min(512, len(tokens) // 20))).long()
    kept = torch.ones(len(tokens), dtype=torch.bool)
    kept[held] = False
    train_tokens, train_embeddings = tokens[kept], embeddings[kept]
    near = nearest(train_embeddings, c.neighbours) if c.neighbours else None

    model = GPT(config.model.gpt)
    init_weights(model, c)
    optimizers = build_optimizers(model, c)
    schedules = [LambdaLR(optimizer, cosine(c)) for optimizer in optimizers]
    model = accelerator.prepare(model)
    optimizers = [accelerator.prepare(optimizer) for optimizer in optimizers]
    schedules = [accelerator.prepare(schedule) for schedule in schedules]
    gpt: GPT = accelerator.unwrap_model(model)
    ema = build_ema(gpt, c.ema)
    average = cast(GPT, ema.module)
    accelerator.register_for_checkpointing(ema)
    start = load_checkpoint(accelerator, args.out)
    order = iter(Shuffle(len(train_tokens), c.seed, start * c.batch_size))
    log = Logger(args.out, c.steps, c.batch_size)

    for step in range(start, c.steps):
        rows = torch.tensor([next(order)[0] for _ in range(c.batch_size)])
        target = train_tokens[rows].to(device)
        generator = torch.Generator().manual_seed(c.seed * 1_000_003 + step)
        embedding = train_embeddings[rows] if near is None else mix(train_embeddings, rows, near, generator)
        condition = perturb(embedding, c.noise_angle, c.condition_dropout, generator).to(device)
        with accelerator.autocast():
            logits = model(corrupt(target[:, :-1], c.token_noise, generator), condition)
        loss = F.cross_entropy(logits.float().flatten(0, 1), target.flatten())
        model.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), c.grad_clip)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        ema.update_parameters(gpt)

        done = step + 1
        if accelerator.is_main_process and done % c.log_every == 0:
            scalars = {"loss": loss.detach(), "lr": schedules[0].get_last_lr()[0]}
            if done % c.sample_every == 0:
                scalars["held_loss"] = evaluate(average, tokens[held].to(device), embeddings[held].to(device))
            log.scalars(done, scalars)
        if accelerator.is_main_process and (done % c.sample_every == 0 or done == c.steps):
            rows = held[:: max(1, len(held) // 16)][:16]
            picture = sample_grid(
                average, vqgan, tokens[rows].to(device), embeddings[rows].to(device), config.model.sampling
            )
            log.picture(done, "samples", picture)
        if done % c.save_every == 0 or done == c.steps:
            save_checkpoint(accelerator, args.out, done, config)
            if accelerator.is_main_process:
                save_tensors(average.state_dict(), args.out / "gpt.safetensors")


def nearest(embeddings: Tensor, count: int) -> Tensor:
    """Rows of the `count` nearest of unit-norm embeddings (N, D) to each, without itself: (N, count) int64.

    With `count` or fewer embeddings in all, there are only N - 1 of them.
    """
    count, found = min(count, len(embeddings) - 1), []
    for rows in torch.arange(len(embeddings)).split(1024):
        similar = embeddings[rows] @ embeddings.t()
        similar[torch.arange(len(rows)), rows] = -1.0  # by place, not by rank: some pictures are there twice
        found.append(similar.topk(count).indices)
    return torch.cat(found)


def mix(embeddings: Tensor, rows: Tensor, near: Tensor, generator: torch.Generator) -> Tensor:
    """Embeddings (B, D) of `rows`, each drawn up to half of the way towards a random one of its nearest; unit norm."""
    pick = torch.randint(near.shape[1], (len(rows), 1), generator=generator)
    other = embeddings[near[rows].gather(1, pick).flatten()]
    share = 0.5 * torch.rand(len(rows), 1, generator=generator)
    return F.normalize(torch.lerp(embeddings[rows], other, share), dim=1)


def corrupt(tokens: Tensor, most: float, generator: torch.Generator) -> Tensor:
    """Replace tokens (B, L) by those of the batch's other images at the same place, of each image a random share."""
    if not most:
        return tokens
    share = most * torch.rand(len(tokens), 1, generator=generator)
    wrong = torch.rand(tokens.shape, generator=generator) < share
    others = tokens[torch.randperm(len(tokens), generator=generator).to(tokens.device)]
    return torch.where(wrong.to(tokens.device), others, tokens)


def perturb(embeddings: Tensor, angle: float, dropout: float, generator: torch.Generator) -> Tensor:
    """What makes image embeddings stand in for those of sentences.

    Each is turned by a random angle of at most `angle` degrees in a random direction (LAFITE, arXiv 2111.13792), and
    with probability `dropout` replaced by zeros, "no condition", so that guidance works.

    Args:
        embeddings: (B, D) unit norm.
    """
    shape = (len(embeddings), 1)
    noise = torch.randn(embeddings.shape, generator=generator)
    noise = noise - (noise * embeddings).sum(1, keepdim=True) * embeddings  # at right angles
    theta = torch.rand(shape, generator=generator) * angle * torch.pi / 180
    turned = theta.cos() * embeddings + theta.sin() * F.normalize(noise, dim=1)
    return torch.where(torch.rand(shape, generator=generator) < dropout, 0.0, turned)


@torch.no_grad()
def evaluate(gpt: GPT, tokens: Tensor, embeddings: Tensor, batch_size: int = 64) -> float:
    """Mean cross-entropy, nats per token, of (N, T) tokens given their unperturbed embeddings (N, D)."""
    total = 0.0
    for t, e in zip(tokens.split(batch_size), embeddings.split(batch_size), strict=True):
        with torch.autocast(t.device.type, torch.bfloat16):
            logits = gpt(t[:, :-1], e)
        total += F.cross_entropy(logits.float().flatten(0, 1), t.flatten()).item() * len(t)
    return total / len(tokens)


@torch.no_grad()
def sample_grid(gpt: GPT, vqgan: VQGAN, tokens: Tensor, embeddings: Tensor, sampling: SamplingConfig) -> Image.Image:
    """Reconstructions of held-out pictures (upper rows) and samples given their embeddings (lower rows)."""
    with torch.autocast(tokens.device.type, torch.bfloat16):
        drawn = generate_tokens(gpt, embeddings, list(range(len(tokens))), replace(sampling, guidance=1.0))
    vqgan = vqgan.to(tokens.device)
    pixels = torch.cat([vqgan.decode_tokens(tokens), vqgan.decode_tokens(drawn.clone())])
    return grid(from_pixels(pixels.float().clamp(-1, 1)), columns=8)


if __name__ == "__main__":
    main()
