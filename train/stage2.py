"""Stage 2: images -> GPT, which learns an image's tokens given its CLIP embedding. No captions.

    python train/stage2.py --config mini --data data/emoji/stage2 --vqgan runs/vqgan \\
        --clip runs/clip/clip.safetensors --out runs/gpt

    torchrun --nproc-per-node 8 train/stage2.py --config coco --data runs/encoded ...

--data is images, which are encoded once to OUT/encoded, or what train/encode.py wrote. Stopped by Ctrl-C, SIGTERM or
worse, the same command goes on. The weights are in OUT/gpt.safetensors (the moving average; gpt_best.safetensors at its
lowest loss on pictures held out), the curves in OUT/scalars.csv and OUT/tensorboard, samples (above: the pictures whose
embeddings they were drawn from) in OUT/samples_*.png.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from clipgen.config import Config, SamplingConfig
from clipgen.gpt import GPT
from clipgen.images import from_pixels, grid
from clipgen.sampling import generate_tokens
from clipgen.vqgan import VQGAN
from train.checkpoint import Checkpoints, fixed_settings, save_tensors
from train.common import (
    build_accelerator,
    build_ema,
    build_optimizers,
    command,
    cosine,
    init_weights,
    own_part,
    parse_args,
    report_failures,
    seeded,
    set_lr,
)
from train.data import Order
from train.encode import Encoded, Encoders, check_origin, hashes, load_encoders, load_vqgan, write_shards
from train.health import check_finite
from train.logger import Logger
from train.stopping import Stop


@command
def main() -> None:
    args, config = parse_args(
        __doc__ or "", vqgan="folder of stage 1, with vqgan.safetensors", clip="CLIP weights, .safetensors"
    )
    c = config.stage2
    accelerator = build_accelerator(c)
    device, mean = accelerator.device, partial(accelerator.reduce, reduction="mean")

    files = {"vqgan": args.vqgan / "vqgan.safetensors", "clip": args.clip}
    vqgan = load_vqgan(config.model.vqgan, files["vqgan"])
    data = open_data(config, args.data, args.out, vqgan, files, accelerator)
    rows, held = split(data.pictures, data.views)
    near = None
    if c.neighbours and isinstance(data, Encoded):  # the configuration refuses neighbours from pixels
        every = data.embeddings()[rows]
        near = nearest(every, c.neighbours)

    model = GPT(config.model.gpt)
    init_weights(model, c)
    optimizers = build_optimizers(model, c)
    factor = cosine(c)
    model = accelerator.prepare(model)
    optimizers = [accelerator.prepare(optimizer) for optimizer in optimizers]
    gpt: GPT = accelerator.unwrap_model(model)
    ema = build_ema(gpt, c.ema)
    average = cast(GPT, ema.module)
    best = Best()
    accelerator.register_for_checkpointing(ema, best)

    fixed = fixed_settings(c, gpt=config.model.gpt)
    checkpoints = Checkpoints(accelerator, args.out, c.keep, fixed, asdict(config))
    start = checkpoints.load()
    order, part = Order(len(rows), c.seed), own_part(accelerator, c.batch_size)
    chosen = partial(step_rows, order, c.batch_size)
    batches = data.batches(lambda step: rows[chosen(step)].tolist(), start, c.workers)
    if accelerator.is_main_process:
        log = Logger(args.out, c.steps, c.batch_size, start)
        held_tokens, held_embeddings = (t.to(device) for t in data.read(held.tolist()))

    with Stop() as stop:
        for step in range(start, c.steps):
            # Of the whole batch, whatever the number of processes: noise is drawn per picture, mixed among all.
            target, embedding = next(batches)
            generator = seeded(c, step)
            if near is not None:
                embedding = mix(every, chosen(step), near, generator)
            condition = perturb(embedding, c.noise_angle, c.condition_dropout, generator)[part].to(device)
            previous = corrupt(target[:, :-1], c.token_noise, generator)[part].to(device)
            target = target[part].to(device)
            for optimizer in optimizers:
                set_lr(optimizer, c.lr * factor(step))

            with accelerator.autocast():
                logits = model(previous, condition)
            loss = F.cross_entropy(logits.float().flatten(0, 1), target.flatten())
            model.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), c.grad_clip)
            for optimizer in optimizers:
                optimizer.step()
            ema.update_parameters(gpt)

            done = step + 1
            sampling = done % c.sample_every == 0 or done == c.steps
            if sampling or done % c.log_every == 0:
                scalars = {"loss": mean(loss.detach()), "lr": c.lr * factor(step)}
                if accelerator.is_main_process:
                    if sampling:
                        scalars["held_loss"] = evaluate(average, held_tokens, held_embeddings)
                    log.scalars(done, scalars)
            if sampling and accelerator.is_main_process:
                some = slice(None, None, max(1, len(held) // 16))
                picture = sample_grid(
                    average, vqgan, held_tokens[some][:16], held_embeddings[some][:16], config.model.sampling
                )
                log.picture(done, "samples", picture)
                if best.improved(scalars["held_loss"]):
                    save_tensors(average.state_dict(), args.out / "gpt_best.safetensors")
            stopping = stop.requested()
            if done % c.save_every == 0 or done == c.steps or stopping:
                check_finite(done, {"loss": loss.detach()})
                if accelerator.is_main_process:
                    save_tensors(average.state_dict(), args.out / "gpt.safetensors")
                checkpoints.save(done)
            if stopping:
                report_failures(accelerator, args.out, data.failures)
                stop.leave(f"step {done} of {c.steps} is saved in {args.out}")
    report_failures(accelerator, args.out, data.failures)


def open_data(
    config: Config, data: str, out: Path, vqgan: VQGAN, files: Mapping[str, Path], accelerator: Accelerator
) -> Encoded | Encoders:
    """Tokens and embeddings: of the encoded set that `data` is, or of pictures, encoded to OUT/encoded first.

    Raises:
        DataError: no pictures, or a set that was encoded with other weights.
    """
    if (Path(data) / "index.json").is_file():
        check_origin(Path(data) / "index.json", hashes(files))
        return Encoded(Path(data))
    encoders = load_encoders(config, data, vqgan, files, accelerator)
    if config.stage2.from_pixels:
        return encoders
    write_shards(encoders, out / "encoded")
    return Encoded(out / "encoded")


def split(pictures: int, views: int) -> tuple[Tensor, Tensor]:
    """Rows to train on, and those of one crop of each picture that is never trained on: a twentieth, spread evenly."""
    held = torch.linspace(0, pictures - 1, max(1, min(512, pictures // 20))).long()
    rows = torch.arange(pictures * views)
    return rows[~torch.isin(rows % pictures, held)], held


def step_rows(order: Order, batch_size: int, step: int) -> Tensor:
    """Which of the rows to train on make up the batch of a step, (B,)."""
    return torch.tensor([index for index, _ in order.keys(step * batch_size, batch_size)])


class Best(nn.Module):
    """The lowest loss of held-out pictures so far; part of a checkpoint."""

    loss: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("loss", torch.tensor(float("inf"), dtype=torch.float64))

    def improved(self, loss: float) -> bool:
        """Note a loss; whether it is the lowest."""
        better = loss < self.loss.item()
        if better:
            self.loss.fill_(loss)
        return better


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
    return grid(from_pixels(pixels.float().clamp(-1, 1)), columns=min(8, len(tokens)))


if __name__ == "__main__":
    main()
