"""Stage 2: images -> GPT, which learns an image's tokens given its CLIP embedding. No captions.

    python train/stage2.py --config mini --data data/emoji/stage2 --vqgan runs/vqgan \\
        --clip runs/clip/clip.safetensors --out runs/gpt

    torchrun --nproc-per-node 8 train/stage2.py --config coco --data runs/encoded ...

--data is images, which are encoded once to OUT/encoded, or what train/encode.py wrote. Stopped by Ctrl-C, SIGTERM or
worse, the same command goes on. The weights are in OUT/gpt.safetensors (the moving average; gpt_best.safetensors at its
lowest loss on pictures held out), the curves in OUT/scalars.csv and OUT/tensorboard, samples (above: the pictures whose
embeddings they were drawn from) in OUT/samples_*.png, those of `stage2.prompts` in OUT/prompts_*.png.
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
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel

from clipgen.config import GPTConfig
from clipgen.engine.sampling import generate_tokens
from clipgen.images.pixels import from_pixels, grid
from clipgen.models.gpt import GPT, Block, condition_of
from clipgen.models.vqgan import VQGAN
from clipgen.request import SamplingParams
from train.config import Config
from train.data.images import ResumableSampler
from train.encode import (
    Encoded,
    Encoders,
    check_origin,
    hashes,
    load_clip,
    load_encoders,
    load_vqgan,
    write_shards,
)
from train.loop.checkpoint import Checkpoints, fixed_settings, save_tensors
from train.loop.common import (
    Best,
    build_accelerator,
    build_ema,
    build_optimizers,
    command,
    cosine,
    in_parts,
    init_weights,
    means,
    own_part,
    parse_args,
    recompute,
    report_failures,
    seeded,
    set_lr,
    split,
)
from train.loop.health import Health, check_finite, worse_than_guessing
from train.loop.logger import Logger
from train.loop.sharding import Sharded, shard, whole_state
from train.loop.stopping import Stop
from train.losses.embedding import EmbeddingLoss, clip_loss_rows


@command
def main() -> None:
    paths = {"vqgan": "folder of stage 1, with vqgan.safetensors", "clip": "CLIP weights, .safetensors"}
    args, config = parse_args(__doc__ or "", paths, tracked=True)
    c = config.stage2
    accelerator = build_accelerator(c)
    device, is_main = accelerator.device, accelerator.is_main_process
    mean = partial(accelerator.reduce, reduction="mean")

    files = {"vqgan": args.vqgan / "vqgan.safetensors", "clip": args.clip}
    vqgan = load_vqgan(config.model.vqgan, files["vqgan"]).to(device)
    clip = load_clip(config.model.gpt, files["clip"]).to(device) if c.clip_weight or c.prompts else None
    data = open_data(config, args.data, args.out, vqgan, files, accelerator)
    pictures, held = split(data.pictures, c.held_out)
    rows = every_crop(pictures, data.pictures, data.views)
    near = None
    if c.neighbours and isinstance(data, Encoded):  # the configuration refuses neighbours from pixels
        every = data.embeddings()[rows]
        near = nearest(every, c.neighbours)

    conditioned = partial(condition_of, config=config.model.gpt)
    gpt = GPT(config.model.gpt)
    init_weights(gpt, c)
    ema = build_ema(gpt.to(device), c.ema)
    if c.recompute:
        recompute(gpt, (Block,))
    if c.parallel == "fsdp":
        for copy in (gpt, cast(GPT, ema.module)):
            shard(copy, copy.blocks, device, c.precision == "bf16")
        model: nn.Module = gpt
        optimizers = build_optimizers(gpt, c)
        sharded = Sharded({"model": gpt, "average": ema}, optimizers[0])
    else:
        model, sharded = accelerator.prepare(gpt), None
        optimizers = [accelerator.prepare(optimizer) for optimizer in build_optimizers(gpt, c)]
        accelerator.register_for_checkpointing(ema)
    best, factor = Best(), cosine(c)
    accelerator.register_for_checkpointing(best)
    embedding_loss = EmbeddingLoss(vqgan, clip) if c.clip_weight and clip is not None else None
    looked = clip_loss_rows(c, accelerator.num_processes) if embedding_loss else slice(None)

    fixed = fixed_settings(c, gpt=config.model.gpt)
    checkpoints = Checkpoints(accelerator, args.out, c.keep, fixed, asdict(config), sharded)
    start = checkpoints.load()
    order, part = ResumableSampler(len(rows), c.seed), own_part(accelerator, c.batch_size)
    chosen = partial(step_rows, order, c.batch_size)
    batches = data.batches(lambda step: rows[chosen(step)].tolist(), start, c.workers)
    health = Health(c.patience, [worse_than_guessing(config.model.gpt.vocab_size)], is_main)
    if is_main:
        log = Logger(args.out, c.steps, c.batch_size, start, args.tracker, asdict(config))
        held_tokens, held_embeddings = (t.to(device) for t in data.read(held.tolist()))
        held_embeddings = conditioned(held_embeddings)
        asked = conditioned(clip.encode_text(c.prompts)) if clip is not None and c.prompts else None

    with Stop() as stop:
        for step in range(start, c.steps):
            # Of the whole batch, whatever the number of processes: noise is drawn per picture, mixed among all.
            target, embedding = next(batches)
            generator = seeded(c, step)
            if near is not None:
                embedding = mix(every, chosen(step), near, generator)
            condition = conditioned(perturb(embedding, c.noise_angle, c.condition_dropout, generator))
            previous = corrupt(target[:, :-1], c.token_noise, generator)
            cut = [whole[part].to(device).chunk(c.accumulate) for whole in (previous, condition, target)]
            for optimizer in optimizers:
                set_lr(optimizer, c.lr * factor(step))
                optimizer.zero_grad()

            done = step + 1
            found = []
            for before, given, tokens in in_parts(accelerator, model, list(zip(*cut, strict=True))):
                with accelerator.autocast():
                    logits = model(before, given)
                loss = F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
                scalars = {"loss": loss.detach()}
                if embedding_loss and done % c.clip_every == 0:
                    with accelerator.autocast():
                        distance = embedding_loss(logits[looked], given[looked])
                    loss = loss + c.clip_weight * c.clip_every * distance
                    scalars["clip_distance"] = distance.detach()
                accelerator.backward(loss / c.accumulate)
                found.append(scalars)
            norm = accelerator.clip_grad_norm_(model.parameters(), c.grad_clip)
            for optimizer in optimizers:
                optimizer.step()
            ema.update_parameters(gpt)
            scalars = means(found)
            if not accelerator.optimizer_step_was_skipped:  # in half precision, when gradients were scaled up too far
                scalars["grad_norm"] = norm.full_tensor() if isinstance(norm, DTensor) else norm

            sampling = done % c.sample_every == 0 or done == c.steps
            stopping = stop.requested()
            saving = done % c.save_every == 0 or done == c.steps or stopping
            if sampling or saving:
                average = average_model(ema, config.model.gpt, is_main)
            if sampling or done % c.log_every == 0:
                line = mean(scalars) | {"lr": torch.tensor(c.lr * factor(step))}
                if is_main:
                    quality = evaluate(average, held_tokens, held_embeddings) if sampling else {}
                    log.scalars(done, line | quality)
                    if sampling:
                        few = slice(None, None, max(1, len(held) // 16))
                        shown = held_tokens[few][:16], held_embeddings[few][:16]
                        log.picture(done, "samples", sample_grid(average, vqgan, *shown, config.model.sampling))
                        if asked is not None:
                            drawn = draw(average, asked, config.model.sampling)
                            log.picture(done, "prompts", token_grid(vqgan, drawn))
                    if sampling and best.improved(quality["held_loss"]):
                        save_tensors(average.state_dict(), args.out / "gpt_best.safetensors")
                health.check(done, line)
            if saving:
                check_finite(done, {name: mean(scalars[name]) for name in ("loss", "grad_norm") if name in scalars})
                if is_main:
                    save_tensors(average.state_dict(), args.out / "gpt.safetensors")
                checkpoints.save(done)
            if stopping:
                report_failures(accelerator, args.out, data.failures)
                stop.leave(f"step {done} of {c.steps} is saved in {args.out}")
    report_failures(accelerator, args.out, data.failures)
    if is_main:
        log.close()


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


def every_crop(pictures: Tensor, count: int, views: int) -> Tensor:
    """Rows of an encoded set of `count` pictures that are crops of some of them: (P,) -> (P * views,)."""
    return torch.cat([pictures + view * count for view in range(views)])


def step_rows(order: ResumableSampler, batch_size: int, step: int) -> Tensor:
    """Which of the rows to train on make up the batch of a step, (B,)."""
    return torch.tensor([index for index, _ in order.keys(step * batch_size, batch_size)])


def nearest(embeddings: Tensor, count: int) -> Tensor:
    """Rows of the `count` nearest of unit-norm embeddings (N, D) to each, without itself: (N, count) int64.

    With `count` or fewer embeddings in all, there are only N - 1 of them. Of several things each, (N, K, D), a row has
    only itself near: half of another thing would be drawn as neither.
    """
    if embeddings.ndim == 3:
        alone = (~embeddings[:, 1:].any(-1).any(-1)).nonzero()[:, 0]
        among = alone[nearest(embeddings[alone, 0], count)]
        near = torch.arange(len(embeddings))[:, None].repeat(1, among.shape[1])
        near[alone] = among
        return near
    count, found = min(count, len(embeddings) - 1), []
    for rows in torch.arange(len(embeddings)).split(1024):
        similar = embeddings[rows] @ embeddings.t()
        similar[torch.arange(len(rows)), rows] = -1.0  # by place, not by rank: some pictures are there twice
        found.append(similar.topk(count).indices)
    return torch.cat(found)


def mix(embeddings: Tensor, rows: Tensor, near: Tensor, generator: torch.Generator) -> Tensor:
    """Embeddings (B, ..., D) of `rows`, each up to half of the way towards a random one of its nearest; unit norm."""
    pick = torch.randint(near.shape[1], (len(rows), 1), generator=generator)
    other = embeddings[near[rows].gather(1, pick).flatten()]
    share = 0.5 * torch.rand(len(rows), *[1] * (other.ndim - 1), generator=generator)
    return F.normalize(torch.lerp(embeddings[rows], other, share), dim=-1)


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
        embeddings: (B, D) unit norm, or (B, K, D) of several things each, zeros for those that are not there.
    """
    noise = torch.randn(embeddings.shape, generator=generator)
    noise = noise - (noise * embeddings).sum(-1, keepdim=True) * embeddings  # at right angles
    theta = torch.rand(embeddings[..., :1].shape, generator=generator) * angle * torch.pi / 180
    turned = theta.cos() * embeddings + theta.sin() * F.normalize(noise, dim=-1)
    dropped = torch.rand(len(embeddings), *[1] * (embeddings.ndim - 1), generator=generator) < dropout
    return torch.where(dropped | ~embeddings.any(-1, keepdim=True), 0.0, turned)


def average_model(ema: AveragedModel, config: GPTConfig, is_main: bool) -> GPT:
    """The moving average as a model that one process can run. All processes call this.

    Of a sharded one it is a copy, of which only the main process has the weights.
    """
    if not isinstance(ema.module, FSDPModule):
        return cast(GPT, ema.module)
    weights = whole_state(ema.module)
    device = next(ema.parameters()).device
    with torch.device("meta"):
        gpt = GPT(config).eval().requires_grad_(False)
    if is_main:
        gpt.to_empty(device=device).load_state_dict(weights)
    return gpt


@torch.no_grad()
def evaluate(gpt: GPT, tokens: Tensor, embeddings: Tensor, batch_size: int = 64) -> dict[str, float]:
    """Mean cross-entropy, nats per token, of (N, T) tokens given their unperturbed conditions (N, C)."""
    total = 0.0
    for t, e in zip(tokens.split(batch_size), embeddings.split(batch_size), strict=True):
        with torch.autocast(t.device.type, torch.bfloat16):
            logits = gpt(t[:, :-1], e)
        total += F.cross_entropy(logits.float().flatten(0, 1), t.flatten()).item() * len(t)
    return {"held_loss": total / len(tokens)}


@torch.no_grad()
def sample_grid(gpt: GPT, vqgan: VQGAN, tokens: Tensor, embeddings: Tensor, sampling: SamplingParams) -> Image.Image:
    """Reconstructions of pictures' tokens (N, T), eight in a row, and below them samples given their embeddings."""
    drawn = draw(gpt, embeddings, replace(sampling, guidance=1.0))
    return token_grid(vqgan, torch.cat([tokens, drawn]), columns=min(8, len(tokens)))


def draw(gpt: GPT, embeddings: Tensor, sampling: SamplingParams) -> Tensor:
    """Tokens (N, T) of one sample of each embedding (N, D)."""
    return generate_tokens(gpt, embeddings, list(range(len(embeddings))), sampling).clone()


@torch.no_grad()
def token_grid(vqgan: VQGAN, tokens: Tensor, columns: int = 8) -> Image.Image:
    """The pictures of tokens (N, T), so many in a row."""
    return grid(from_pixels(vqgan.decode_tokens(tokens)), columns)


if __name__ == "__main__":
    main()
