"""Stage 1: images -> VQGAN.

    python train/stage1.py --config mini --data photos --out runs/vqgan
    torchrun --nproc-per-node 8 train/stage1.py --config coco --data "photos/{000000..000127}.tar" --out runs/vqgan

After an interruption, the same command continues from the newest checkpoint. Writes
    OUT/vqgan.safetensors          the moving average of the weights; vqgan_best.safetensors at its lowest held-out loss
    OUT/scalars.csv, tensorboard   curves
    OUT/reconstruction_*.png       held-out images, their reconstructions below
    OUT/skipped.txt                images that could not be read
"""

from __future__ import annotations

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

from argparse import Namespace
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path
from typing import cast

import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from clipgen.evaluation.metrics import psnr
from clipgen.images.pixels import from_pixels, grid
from clipgen.models.vqgan import VQGAN, AttnBlock, ResBlock
from train.config import Config
from train.data.images import Images, ResumableSampler
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
from train.loop.health import Health, check_finite, collapsed_codes, discriminator_wins
from train.loop.loader import image_batches
from train.loop.logger import Logger
from train.loop.optimization import LowestLoss, MovingAverage, cosine_schedule, enable_recompute, init_weights, set_lr
from train.loop.output import lock_output
from train.loop.script import command, parse_args, report_failures
from train.loop.stopping import Stop
from train.losses.codes import CodeUsage, EMACodebook, encode_latents, revive_codes
from train.losses.gan import Gan
from train.losses.stage1 import Crop, LeCam, PatchDiscriminator, ReconstructionLoss

MAX_VALIDATED = 128
"""Most held-out images that are reconstructed for validation."""


@command
def main() -> None:
    args, config = parse_args(__doc__ or "", tracked=True)
    with lock_output(args.out):
        train(args, config)


def train(args: Namespace, config: Config) -> None:
    """Train a VQGAN to the last step, or until stopped."""
    c = config.stage1
    accelerator = build_accelerator(c)
    device, is_main = accelerator.device, accelerator.is_main_process
    all_reduce_mean = partial(accelerator.reduce, reduction="mean")
    all_reduce_sum = partial(accelerator.reduce, reduction="sum")
    stop = Stop(args.minutes)
    data = Images(args.data, config.model.vqgan.image_size, c.min_scale)
    rows, held_out = split_held_out(len(data), c.held_out)

    model = VQGAN(config.model.vqgan)
    init_weights(model, c)
    if c.only_decoder:
        for frozen in (model.encoder, model.quant_conv, model.quantizer):
            frozen.requires_grad_(False)
    ema_codebook = EMACodebook(model.quantizer).to(device) if c.codes == "ema" else None
    discriminator = PatchDiscriminator(c.disc_ch)
    reconstruction_loss = ReconstructionLoss(c).to(device)
    trainable = [p for p in model.parameters() if p.requires_grad]
    opt_g = torch.optim.Adam(trainable, c.lr, betas=(c.betas[0], c.betas[1]))
    opt_d = torch.optim.Adam(discriminator.parameters(), c.disc_lr, betas=(0.5, 0.9))
    lr_factor = cosine_schedule(c)
    stop.wait_for_others()  # who may still be fetching shards or LPIPS
    model, discriminator, opt_g, opt_d = accelerator.prepare(model, discriminator, opt_g, opt_d)
    vqgan: VQGAN = accelerator.unwrap_model(model)
    ema = MovingAverage(vqgan, c.ema)
    average = cast(VQGAN, ema.module)
    if c.recompute:
        enable_recompute(vqgan, (ResBlock, AttnBlock))
    usage, lowest, lecam = CodeUsage(config.model.vqgan.codebook_size).to(device), LowestLoss(), LeCam().to(device)
    accelerator.register_for_checkpointing(ema, usage, lowest, lecam)
    if ema_codebook is not None:
        ema_codebook.attach(vqgan.quantizer)
        accelerator.register_for_checkpointing(ema_codebook)

    fixed = fixed_settings(c, data.fingerprint(), vqgan=config.model.vqgan)
    checkpoints = Checkpoints(accelerator, args.out, c.keep, fixed, asdict(config))
    start = checkpoints.load(args.resume_step)
    if not is_main:
        usage.clear()  # the main process has restored the counts of all
    sampler, own_rows = ResumableSampler(len(rows), c.seed), process_rows(accelerator, c.batch_size)

    def keys(step: int) -> list[tuple[int, int]]:
        return [(int(rows[i]), crop) for i, crop in sampler.keys(step * c.batch_size, c.batch_size)[own_rows]]

    batches = image_batches(data, keys, count(start), c.workers, stop)
    gan = Gan(c, accelerator, vqgan, discriminator, opt_d, reconstruction_loss, lecam)
    symptoms = [collapsed_codes(config.model.vqgan.codebook_size), discriminator_wins()]
    health = Health(c.patience, symptoms, verbose=is_main)
    if is_main:
        log = Logger(args.out, c.steps, c.batch_size, start, args.tracker, asdict(config))
        validated = held_out[:: -(-len(held_out) // MAX_VALIDATED)].tolist()
        held_out_images = data.batch([(row, 0) for row in validated]).pixels.to(device)

    with stop:
        for step in range(start, c.steps):
            batch = next(batches, None)
            if batch is None:
                stop.leave_unsaved(args.out)
            x = to_device(batch.pixels, device)
            parts = x.chunk(c.accumulate)
            generator = step_generator(c, step)
            crop = Crop.random(x.shape[-2:], c.perceptual_crop, generator)
            adversarial_phase = step >= c.disc_start
            set_lr(opt_g, c.lr * lr_factor(step))
            set_lr(opt_d, c.disc_lr * lr_factor(step))

            # Train the VQGAN.
            weight = gan.batch_weight(parts, crop) if adversarial_phase else None
            rows_of_scalars, fakes = [], []
            opt_g.zero_grad()
            for x_part in micro_batches(accelerator, model, parts):
                with accelerator.autocast():
                    y, codebook_loss, indices = model(x_part)
                    reconstruction, scalars = reconstruction_loss(y, x_part, crop)
                loss = reconstruction + codebook_loss
                scalars |= {"codebook": codebook_loss.detach(), "loss": loss.detach()}
                if adversarial_phase:
                    adversarial, gan_scalars = gan.loss(reconstruction, y, weight)
                    loss, scalars = loss + adversarial, scalars | gan_scalars
                accelerator.backward(loss / len(parts))
                usage.update(indices)
                rows_of_scalars.append(scalars)
                fakes.append(y.detach().float())
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), c.grad_clip)
            opt_g.step()
            if ema_codebook is not None:
                ema_codebook.update(all_reduce_sum)
            ema.update_parameters(vqgan)
            scalars = mean_scalars(rows_of_scalars)
            if accelerator.optimizer_step_was_skipped:  # fp16 gradients overflowed
                scalars.pop("adaptive_weight", None)
            else:
                scalars["grad_norm"] = grad_norm

            # Train the discriminator.
            if adversarial_phase:
                scalars |= gan.step(parts, fakes)

            done = step + 1
            if c.revive_every and done % c.revive_every == 0:
                if done < c.disc_start:
                    z = accelerator.gather(encode_latents(vqgan, x))
                    moved = revive_codes(vqgan.quantizer, all_reduce_sum(usage.counts), z, generator)
                    if ema_codebook is not None:
                        ema_codebook.reset(moved)
                usage.counts.zero_()
            sampling = done % c.sample_every == 0 or done == c.steps
            if sampling or done % c.log_every == 0:
                line = all_reduce_mean(scalars) | usage.report(all_reduce_sum)
                check_finite(done, line)  # before images of such weights, which would be refused with a lesser message
                if is_main:
                    quality = validate_vqgan(average, reconstruction_loss, held_out_images) if sampling else {}
                    log.scalars(done, line | quality)
                    if sampling:
                        log.image(done, "reconstruction", reconstruction_grid(average, held_out_images))
                    if sampling and lowest.improved(quality["held_loss"]):
                        save_tensors(average.state_dict(), args.out / "vqgan_best.safetensors")
                health.check(done, line)
            stopping = stop.requested()
            if done % c.save_every == 0 or done == c.steps or stopping:
                numbers = [name for name in ("loss", "grad_norm") if name in scalars]
                check_finite(done, {name: all_reduce_mean(scalars[name]) for name in numbers})
                if is_main:
                    save_vqgan(average, args.out)
                usage.gather(all_reduce_sum, is_main)
                checkpoints.save(done)
            if stopping:
                report_failures(accelerator, args.out, data.failures)
                stop.leave(f"step {done} of {c.steps} is saved in {args.out}")
    report_failures(accelerator, args.out, data.failures)
    if is_main:
        log.close()


@torch.no_grad()
def validate_vqgan(vqgan: VQGAN, reconstruction_loss: ReconstructionLoss, x: Tensor) -> dict[str, float]:
    """Mean reconstruction loss and PSNR, dB, of images (N, 3, H, W) in [-1, 1]."""
    loss = decibels = 0.0
    for part in x.split(16):
        y = vqgan(part)[0].float()
        loss += float(reconstruction_loss(y, part)[0]) * len(part)
        decibels += float(psnr(y.clamp(-1, 1), part, 2).sum())
    return {"held_loss": loss / len(x), "held_psnr": decibels / len(x)}


@torch.no_grad()
def reconstruction_grid(vqgan: VQGAN, x: Tensor) -> Image.Image:
    """Up to sixteen of the images (N, 3, H, W) in the upper rows, their reconstructions below."""
    x = x[:: max(1, len(x) // 16)][:16]
    return grid(from_pixels(torch.cat([x, vqgan(x)[0].float()])), columns=min(8, len(x)))


def save_vqgan(vqgan: VQGAN, out: Path) -> None:
    """Write vqgan.safetensors and the configuration of the model, vqgan.yaml."""
    save_tensors(vqgan.state_dict(), out / "vqgan.safetensors")
    OmegaConf.save(OmegaConf.create(asdict(vqgan.config)), out / "vqgan.yaml")


if __name__ == "__main__":
    main()
