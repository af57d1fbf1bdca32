"""Stage 2: images -> GPT, which learns the tokens of an image given its CLIP embedding. No captions.

    python train/stage2.py --config mini --data photos --vqgan runs/vqgan \\
        --clip clip.safetensors --out runs/gpt

    torchrun --nproc-per-node 8 train/stage2.py --config coco --data runs/encoded ...

--data is images, which are encoded to OUT/encoded first, or what train/encode.py wrote; --seen is other images of the
same names, which CLIP embeds instead. After an interruption, the same command continues from the newest checkpoint.
Writes
    OUT/gpt.safetensors            the moving average of the weights; gpt_best.safetensors at its lowest held-out loss
    OUT/scalars.csv, tensorboard   curves
    OUT/samples_*.png              held-out images, samples from their embeddings below
    OUT/prompts_*.png              samples from the sentences in `stage2.prompts`
"""

from __future__ import annotations

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from clipgen.config import GPTConfig
from clipgen.errors import DataError
from clipgen.models.gpt import GPT, Block
from clipgen.models.vqgan import VQGAN
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
from train.loop.batches import (
    build_accelerator,
    mean_scalars,
    micro_batches,
    process_rows,
    split_held_out,
    step_generator,
    to_device,
)
from train.loop.checkpoint import Checkpoints, fixed_settings, save_tensors
from train.loop.health import Health, check_finite, worse_than_guessing
from train.loop.logger import Logger
from train.loop.optimization import (
    LowestLoss,
    MovingAverage,
    build_optimizers,
    cosine_schedule,
    enable_recompute,
    init_weights,
    set_lr,
)
from train.loop.output import check_output, lock_output
from train.loop.samples import sample, sample_grid, token_grid
from train.loop.script import command, parse_args, report_failures
from train.loop.sharding import ShardedState, check_processes, full_state_dict, shard_model
from train.loop.stopping import Stop
from train.losses.embedding import EmbeddingLoss, clip_loss_rows


@command
def main() -> None:
    paths = {"vqgan": "folder of stage 1, with vqgan.safetensors", "clip": "CLIP weights, .safetensors"}
    args, config = parse_args(__doc__ or "", paths, {"seen": "images for CLIP, in place of --data"}, tracked=True)
    if args.seen:
        check_output(args.seen, args.out)
    with lock_output(args.out):
        train(args, config)


def train(args: Namespace, config: Config) -> None:
    """Train a GPT to the last step, or until stopped."""
    c = config.stage2
    accelerator = build_accelerator(c)
    device, is_main = accelerator.device, accelerator.is_main_process
    all_reduce_mean = partial(accelerator.reduce, reduction="mean")

    stop = Stop(args.minutes)
    if c.parallel == "fsdp":
        check_processes()

    files = {"vqgan": args.vqgan / "vqgan.safetensors", "clip": args.clip}
    vqgan = load_vqgan(config.model.vqgan, files["vqgan"]).to(device)
    clip = load_clip(config.model.gpt, files["clip"]).to(device) if c.clip_weight or c.prompts else None
    embedding_loss = EmbeddingLoss(vqgan, clip) if c.clip_weight and clip is not None else None
    embedded_rows = clip_loss_rows(c, accelerator.num_processes) if embedding_loss else slice(None)
    gpt = GPT(config.model.gpt)
    init_weights(gpt, c)
    data = open_data(config, args.data, args.seen, args.out, vqgan, files, accelerator, stop)
    trained, held_out = split_held_out(data.num_images, c.held_out)
    rows = crop_rows(trained, data.num_images, data.views)
    neighbours = None
    if c.neighbours and isinstance(data, Encoded):  # the configuration refuses neighbours from pixels
        embeddings = data.embeddings()[rows]
        neighbours = nearest_neighbours(embeddings.to(device), c.neighbours).cpu()

    ema = MovingAverage(gpt.to(device), c.ema)
    if c.recompute:
        enable_recompute(gpt, (Block,))
    if c.parallel == "fsdp":
        for copy in (gpt, cast(GPT, ema.module)):
            shard_model(copy, copy.blocks, device, accelerator.mixed_precision == "bf16")
        model: nn.Module = gpt
        optimizers = build_optimizers(gpt, c, accelerator.mixed_precision)
        sharded = ShardedState({"model": gpt, "average": ema}, optimizers[0])
    else:
        model, sharded = accelerator.prepare(gpt), None
        optimizers = build_optimizers(gpt, c, accelerator.mixed_precision)
        optimizers = [accelerator.prepare(optimizer) for optimizer in optimizers]
        accelerator.register_for_checkpointing(ema)
    lowest, lr_factor = LowestLoss(), cosine_schedule(c)
    accelerator.register_for_checkpointing(lowest)

    fixed = fixed_settings(c, data.fingerprint, gpt=config.model.gpt)
    fixed |= {name: data.origin[name][:16] for name in files if name in data.origin}
    checkpoints = Checkpoints(accelerator, args.out, c.keep, fixed, asdict(config), sharded)
    torch.manual_seed(c.seed + accelerator.process_index)  # of dropout, in different images
    start = checkpoints.load(args.resume_step)
    sampler, own_rows = ResumableSampler(len(rows), c.seed), process_rows(accelerator, c.batch_size)
    batch_rows = partial(step_rows, sampler, c.batch_size)
    batches = data.batches(lambda step: rows[batch_rows(step)].tolist(), start, c.workers, stop)
    health = Health(c.patience, [worse_than_guessing(config.model.gpt.vocab_size)], verbose=is_main)
    if is_main:
        log = Logger(args.out, c.steps, c.batch_size, start, args.tracker, asdict(config))
        held_tokens, held_embeddings = (t.to(device) for t in data.read(held_out.tolist()))
        prompt_embeddings = clip.encode_text(c.prompts) if clip is not None and c.prompts else None

    with stop:
        for step in range(start, c.steps):
            # Every process augments the whole batch, so that the result does not depend on their number.
            targets, embedding = next(batches, (None, None))
            if targets is None or embedding is None:
                stop.leave_unsaved(args.out)
            generator = step_generator(c, step)
            if neighbours is not None:
                embedding = interpolate(embeddings, batch_rows(step), neighbours, generator)
            condition = perturb(embedding, c.noise_angle, c.condition_dropout, generator)
            inputs = corrupt(targets[:, :-1], c.token_noise, generator)
            parts = [to_device(t[own_rows], device).chunk(c.accumulate) for t in (inputs, condition, targets)]
            for optimizer in optimizers:
                set_lr(optimizer, c.lr * lr_factor(step))
                optimizer.zero_grad()

            done = step + 1
            rows_of_scalars = []
            for tokens, e, target in micro_batches(accelerator, model, list(zip(*parts, strict=True))):
                with accelerator.autocast():
                    logits = model(tokens, e)
                loss = F.cross_entropy(logits.float().flatten(0, 1), target.flatten())
                scalars = {"loss": loss.detach()}
                if embedding_loss and done % c.clip_every == 0:
                    with accelerator.autocast():
                        distance, clip_scalars = embedding_loss(logits[embedded_rows], e[embedded_rows])
                    loss, scalars = loss + c.clip_weight * c.clip_every * distance, scalars | clip_scalars
                accelerator.backward(loss / c.accumulate)
                rows_of_scalars.append(scalars)
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), c.grad_clip)
            for optimizer in optimizers:
                optimizer.step()
            ema.update_parameters(gpt)
            scalars = mean_scalars(rows_of_scalars)
            if not accelerator.optimizer_step_was_skipped:  # fp16 gradients overflowed
                scalars["grad_norm"] = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm

            sampling = done % c.sample_every == 0 or done == c.steps
            stopping = stop.requested()
            saving = done % c.save_every == 0 or done == c.steps or stopping
            weights = full_state_dict(ema.module) if sampling or saving else {}
            if sampling or done % c.log_every == 0:
                line = all_reduce_mean(scalars) | {"lr": torch.tensor(c.lr * lr_factor(step))}
                if is_main:
                    quality = {}
                    if sampling:
                        average = average_model(ema, weights, config.model.gpt)
                        quality = validate_gpt(average, held_tokens, held_embeddings, accelerator.autocast)
                    log.scalars(done, line | quality)
                    if sampling:
                        few = slice(None, None, max(1, len(held_out) // 16))
                        shown = held_tokens[few][:16], held_embeddings[few][:16]
                        log.image(done, "samples", sample_grid(average, vqgan, *shown, config.model.sampling))
                        if prompt_embeddings is not None:
                            samples = sample(average, prompt_embeddings, config.model.sampling)
                            log.image(done, "prompts", token_grid(vqgan, samples))
                        del average  # of a sharded model a copy on the GPU
                    if sampling and lowest.improved(quality["held_loss"]):
                        save_tensors(weights, args.out / "gpt_best.safetensors")
                health.check(done, line)
            if saving:
                numbers = [name for name in ("loss", "grad_norm") if name in scalars]
                check_finite(done, {name: all_reduce_mean(scalars[name]) for name in numbers})
                if is_main:
                    save_tensors(weights, args.out / "gpt.safetensors")
                checkpoints.save(done)
            if stopping:
                report_failures(accelerator, args.out, data.failures)
                stop.leave(f"step {done} of {c.steps} is saved in {args.out}")
    report_failures(accelerator, args.out, data.failures)
    if is_main:
        log.close()


def open_data(
    config: Config,
    data: str,
    seen: str | None,
    out: Path,
    vqgan: VQGAN,
    files: Mapping[str, Path],
    accelerator: Accelerator,
    stop: Stop,
) -> Encoded | Encoders:
    """Open the tokens and embeddings of an encoded set, or of images, which are encoded to OUT/encoded first.

    Raises:
        DataError: there are no images, the set was encoded with other weights, or `seen` is given for an encoded set.
    """
    if (Path(data) / "index.json").is_file():
        if seen:
            raise DataError(f"{data} is encoded already; give --seen {seen} to train/encode.py")
        check_origin(Path(data) / "index.json", hashes(files))
        return Encoded(Path(data))
    encoders = load_encoders(config, data, vqgan, files, accelerator, seen)
    if config.stage2.from_pixels:
        stop.wait_for_others()  # who may still be fetching shards
        return encoders
    write_shards(encoders, out / "encoded", config.stage2.workers, stop)
    return Encoded(out / "encoded")


def crop_rows(images: Tensor, count: int, views: int) -> Tensor:
    """Rows of all crops of some images in an encoded set of `count` images: (P,) -> (P * views,)."""
    return torch.cat([images + view * count for view in range(views)])


def step_rows(sampler: ResumableSampler, batch_size: int, step: int) -> Tensor:
    """Training rows that make up the batch of a step, (B,)."""
    return torch.tensor([index for index, _ in sampler.keys(step * batch_size, batch_size)])


def nearest_neighbours(embeddings: Tensor, k: int) -> Tensor:
    """Rows of the k nearest neighbours of each unit-norm embedding (N, D): (N, k) int64, with k at most N - 1."""
    if len(embeddings) < 2:
        return torch.zeros(len(embeddings), 1, dtype=torch.long)  # itself: interpolation changes nothing
    k, neighbours_of = min(k, len(embeddings) - 1), []
    for rows in torch.arange(len(embeddings)).split(1024):
        similarity = embeddings[rows] @ embeddings.t()
        similarity[torch.arange(len(rows)), rows] = -1.0  # by index, not as the top match: duplicates are neighbours
        neighbours_of.append(similarity.topk(k).indices)
    return torch.cat(neighbours_of)


def interpolate(embeddings: Tensor, rows: Tensor, neighbours: Tensor, generator: torch.Generator) -> Tensor:
    """Move embeddings (B, D) of `rows` by 0 to 1/2 of the way to a random one of their neighbours; unit norm."""
    pick = torch.randint(neighbours.shape[1], (len(rows), 1), generator=generator)
    other = embeddings[neighbours[rows].gather(1, pick).flatten()]
    fraction = 0.5 * torch.rand(len(rows), 1, generator=generator)
    return F.normalize(torch.lerp(embeddings[rows], other, fraction), dim=-1)


def corrupt(tokens: Tensor, max_fraction: float, generator: torch.Generator) -> Tensor:
    """Replace a random fraction of each image's tokens (B, L) by those of another image at the same position."""
    if not max_fraction:
        return tokens
    fraction = max_fraction * torch.rand(len(tokens), 1, generator=generator)
    replaced = torch.rand(tokens.shape, generator=generator) < fraction
    others = tokens[to_device(torch.randperm(len(tokens), generator=generator), tokens.device)]
    return torch.where(to_device(replaced, tokens.device), others, tokens)


def perturb(embeddings: Tensor, angle: float, dropout: float, generator: torch.Generator) -> Tensor:
    """Rotate image embeddings randomly, because text embeddings occupy a different region of CLIP space; drop some.

    Each is rotated by up to `angle` degrees in a random direction (LAFITE, arXiv 2111.13792), and with probability
    `dropout` replaced by zeros ("no condition"), which classifier-free guidance needs.

    Args:
        embeddings: (B, D) unit norm.
    """
    noise = to_device(torch.randn(embeddings.shape, generator=generator), embeddings.device)
    noise = noise - (noise * embeddings).sum(-1, keepdim=True) * embeddings  # orthogonal to the embedding
    theta = torch.rand(len(embeddings), 1, generator=generator) * angle * torch.pi / 180
    theta = to_device(theta, embeddings.device)
    rotated = theta.cos() * embeddings + theta.sin() * F.normalize(noise, dim=-1)
    dropped = torch.rand(len(embeddings), 1, generator=generator) < dropout
    return torch.where(to_device(dropped, embeddings.device), 0.0, rotated)


def average_model(ema: MovingAverage, weights: Mapping[str, Tensor], config: GPTConfig) -> GPT:
    """The moving average as a model that this process alone can run: if it is sharded, a copy with `weights`."""
    if not isinstance(ema.module, FSDPModule):
        return cast(GPT, ema.module)
    with torch.device("meta"):
        gpt = GPT(config).eval().requires_grad_(False)
    gpt.to_empty(device=next(ema.parameters()).device).load_state_dict(weights)
    return gpt


@torch.no_grad()
def validate_gpt(
    gpt: GPT,
    tokens: Tensor,
    embeddings: Tensor,
    autocast: Callable[[], AbstractContextManager[None]],
) -> dict[str, float]:
    """Mean cross-entropy, nats per token, of (N, T) tokens given their unperturbed conditions (N, C)."""
    total = 0.0
    for t, e in zip(tokens.split(64), embeddings.split(64), strict=True):
        with autocast():
            logits = gpt(t[:, :-1], e)
        total += F.cross_entropy(logits.float().flatten(0, 1), t.flatten()).item() * len(t)
    return {"held_loss": total / len(tokens)}


if __name__ == "__main__":
    main()
