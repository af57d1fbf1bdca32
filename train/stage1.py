"""Stage 1: images -> VQGAN.

    python train/stage1.py --config mini --data data/emoji/train --out runs/vqgan
    torchrun --nproc-per-node 8 train/stage1.py --config coco --data "photos/{000000..000127}.tar" --out runs/vqgan

Stopped by Ctrl-C, SIGTERM or worse, the same command goes on. The weights are in OUT/vqgan.safetensors (the moving
average; vqgan_best.safetensors where it reconstructs pictures held out best), the curves in OUT/scalars.csv and
OUT/tensorboard, reconstructions of pictures held out (above: the originals) in OUT/reconstruction_*.png, pictures that
could not be read in OUT/skipped.txt.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import cast

import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from clipgen.evaluation.metrics import psnr
from clipgen.images.pixels import from_pixels, grid
from clipgen.models.vqgan import VQGAN, AttnBlock, ResBlock
from train.data.images import Images, ResumableSampler, image_batches
from train.loop.checkpoint import Checkpoints, fixed_settings, save_tensors
from train.loop.common import (
    Best,
    build_accelerator,
    build_ema,
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
from train.loop.health import Health, check_finite, collapsed_codes, discriminator_wins
from train.loop.logger import Logger
from train.loop.stopping import Stop
from train.losses.codes import AverageCodes, CodeUsage, latents, revive_codes
from train.losses.gan import Gan
from train.losses.stage1 import Crop, LeCam, PatchDiscriminator, ReconstructionLoss

MEASURED = 128
"""Most pictures held out that are measured on the way."""


@command
def main() -> None:
    args, config = parse_args(__doc__ or "", tracked=True)
    c = config.stage1
    accelerator = build_accelerator(c)
    device, mean = accelerator.device, partial(accelerator.reduce, reduction="mean")
    total = partial(accelerator.reduce, reduction="sum")
    with accelerator.local_main_process_first():  # remote shards are fetched once
        data = Images(args.data, config.model.vqgan.image_size, c.min_scale)
    rows, held = split(len(data), c.held_out)

    model = VQGAN(config.model.vqgan)
    init_weights(model, c)
    if c.only_decoder:
        for frozen in (model.encoder, model.quant_conv, model.quantizer):
            frozen.requires_grad_(False)
    averages = AverageCodes(model.quantizer).to(device) if c.codes == "ema" else None
    discriminator = PatchDiscriminator(c.disc_ch)
    likeness = ReconstructionLoss(c).to(device)
    learned = [p for p in model.parameters() if p.requires_grad]
    opt_g = torch.optim.Adam(learned, c.lr, betas=(c.betas[0], c.betas[1]))
    opt_d = torch.optim.Adam(discriminator.parameters(), c.disc_lr, betas=(0.5, 0.9))
    factor = cosine(c)
    model, discriminator, opt_g, opt_d = accelerator.prepare(model, discriminator, opt_g, opt_d)
    vqgan: VQGAN = accelerator.unwrap_model(model)
    ema = build_ema(vqgan, c.ema)
    average = cast(VQGAN, ema.module)
    if c.recompute:
        recompute(vqgan, (ResBlock, AttnBlock))
    usage, best, lecam = CodeUsage(config.model.vqgan.codebook_size).to(device), Best(), LeCam().to(device)
    accelerator.register_for_checkpointing(ema, usage, best, lecam)
    if averages is not None:
        averages.watch(vqgan.quantizer)
        accelerator.register_for_checkpointing(averages)

    fixed = fixed_settings(c, vqgan=config.model.vqgan)
    checkpoints = Checkpoints(accelerator, args.out, c.keep, fixed, asdict(config))
    start = checkpoints.load()
    order, part = ResumableSampler(len(rows), c.seed), own_part(accelerator, c.batch_size)

    def keys(step: int) -> list[tuple[int, int]]:
        return [(int(rows[i]), crop) for i, crop in order.keys(step * c.batch_size, c.batch_size)[part]]

    batches = image_batches(data, keys, start, c.workers)
    gan = Gan(c, accelerator, vqgan, discriminator, opt_d, likeness, lecam)
    signs = [collapsed_codes(config.model.vqgan.codebook_size), discriminator_wins()]
    health = Health(c.patience, signs, accelerator.is_main_process)
    if accelerator.is_main_process:
        log = Logger(args.out, c.steps, c.batch_size, start, args.tracker, asdict(config))
        measured = held[:: -(-len(held) // MEASURED)].tolist()
        shown = data.batch([(row, 0) for row in measured]).pixels.to(device)

    with Stop() as stop:
        for step in range(start, c.steps):
            x = next(batches).pixels.to(device)
            parts = x.chunk(c.accumulate)
            generator = seeded(c, step)
            crop = Crop.draw(x.shape[-2:], c.perceptual_crop, generator)
            adversarial_phase = step >= c.disc_start
            set_lr(opt_g, c.lr * factor(step))
            set_lr(opt_d, c.disc_lr * factor(step))

            # The VQGAN's step.
            weight = gan.whole_weight(parts, crop) if adversarial_phase else None
            found, fakes = [], []
            opt_g.zero_grad()
            for some in in_parts(accelerator, model, parts):
                with accelerator.autocast():
                    reconstruction, codebook, indices = model(some)
                    unlike, scalars = likeness(reconstruction, some, crop)
                loss = unlike + codebook
                scalars |= {"codebook": codebook.detach(), "loss": loss.detach()}
                if adversarial_phase:
                    adversarial, more = gan.loss(unlike, reconstruction, weight)
                    loss, scalars = loss + adversarial, scalars | more
                accelerator.backward(loss / len(parts))
                usage.count(indices)
                found.append(scalars)
                fakes.append(reconstruction.detach().float())
            norm = accelerator.clip_grad_norm_(model.parameters(), c.grad_clip)
            opt_g.step()
            if averages is not None:
                averages.update(total)
            ema.update_parameters(vqgan)
            scalars = means(found)
            if accelerator.optimizer_step_was_skipped:  # in half precision, when gradients were scaled up too far
                scalars.pop("adaptive_weight", None)
            else:
                scalars["grad_norm"] = norm

            if adversarial_phase:
                scalars |= gan.step(parts, fakes)

            done = step + 1
            if c.revive_every and done % c.revive_every == 0:
                if done < c.disc_start:
                    z = accelerator.gather(latents(vqgan, x))
                    moved = revive_codes(vqgan.quantizer, total(usage.counts), z, generator)
                    if averages is not None:
                        averages.restart(moved)
                usage.counts.zero_()
            sampling = done % c.sample_every == 0 or done == c.steps
            if sampling or done % c.log_every == 0:
                line = mean(scalars) | usage.report(total)
                if accelerator.is_main_process:
                    quality = evaluate(average, likeness, shown) if sampling else {}
                    log.scalars(done, line | quality)
                    if sampling:
                        log.picture(done, "reconstruction", reconstruction_grid(average, shown))
                    if sampling and best.improved(quality["held_loss"]):
                        save_tensors(average.state_dict(), args.out / "vqgan_best.safetensors")
                health.check(done, line)
            stopping = stop.requested()
            if done % c.save_every == 0 or done == c.steps or stopping:
                check_finite(done, {name: mean(scalars[name]) for name in ("loss", "grad_norm") if name in scalars})
                if accelerator.is_main_process:
                    export(average, args.out)
                checkpoints.save(done)
            if stopping:
                report_failures(accelerator, args.out, data.failures)
                stop.leave(f"step {done} of {c.steps} is saved in {args.out}")
    report_failures(accelerator, args.out, data.failures)
    if accelerator.is_main_process:
        log.close()


@torch.no_grad()
def evaluate(vqgan: VQGAN, likeness: ReconstructionLoss, x: Tensor, batch_size: int = 16) -> dict[str, float]:
    """How well pictures (N, 3, H, W) come back: the loss that is trained without a GAN, and PSNR, dB, their means."""
    loss = decibels = 0.0
    for some in x.split(batch_size):
        y = vqgan(some)[0].float()
        loss += float(likeness(y, some)[0]) * len(some)
        decibels += float(psnr(y.clamp(-1, 1), some, 2).sum())
    return {"held_loss": loss / len(x), "held_psnr": decibels / len(x)}


@torch.no_grad()
def reconstruction_grid(vqgan: VQGAN, x: Tensor) -> Image.Image:
    """Sixteen of the originals (N, 3, H, W) in the upper rows, their reconstructions below."""
    x = x[:: max(1, len(x) // 16)][:16]
    return grid(from_pixels(torch.cat([x, vqgan(x)[0].float()])), columns=min(8, len(x)))


def export(vqgan: VQGAN, out: Path) -> None:
    """Write vqgan.safetensors and the configuration it was built from."""
    save_tensors(vqgan.state_dict(), out / "vqgan.safetensors")
    OmegaConf.save(OmegaConf.create(asdict(vqgan.config)), out / "vqgan.yaml")


if __name__ == "__main__":
    main()
