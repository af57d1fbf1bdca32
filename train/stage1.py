"""Stage 1: images -> VQGAN.

    python train/stage1.py --config mini --data data/emoji/train --out runs/vqgan
    torchrun --nproc-per-node 8 train/stage1.py --config coco --data "photos/{000000..000127}.tar" --out runs/vqgan

Stopped by Ctrl-C, SIGTERM or worse, the same command goes on. The weights are in OUT/vqgan.safetensors (the moving
average), the curves in OUT/scalars.csv and OUT/tensorboard, reconstructions (above: the originals) in
OUT/reconstruction_*.png, pictures that could not be read in OUT/skipped.txt.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from clipgen.images import from_pixels, grid
from clipgen.vqgan import VQGAN
from train.checkpoint import Checkpoints, fixed_settings, save_tensors
from train.common import (
    Logger,
    build_accelerator,
    build_ema,
    check_finite,
    command,
    cosine,
    init_weights,
    own_part,
    parse_args,
    report_failures,
    seeded,
    set_lr,
)
from train.data import Images, Order, image_batches
from train.losses import PatchDiscriminator, adaptive_weight, build_perceptual, discriminator_loss, generator_loss
from train.stopping import Stop


@command
def main() -> None:
    args, config = parse_args(__doc__ or "")
    c = config.stage1
    accelerator = build_accelerator(c)
    device, mean = accelerator.device, partial(accelerator.reduce, reduction="mean")
    with accelerator.local_main_process_first():  # remote shards are fetched once
        data = Images(args.data, config.model.vqgan.image_size, c.min_scale)

    model = VQGAN(config.model.vqgan)
    init_weights(model, c)
    discriminator = PatchDiscriminator(c.disc_ch)
    perceptual = build_perceptual(c.perceptual)
    opt_g = torch.optim.Adam(model.parameters(), c.lr, betas=(c.betas[0], c.betas[1]))
    opt_d = torch.optim.Adam(discriminator.parameters(), c.disc_lr, betas=(0.5, 0.9))
    factor = cosine(c)
    model, discriminator, opt_g, opt_d = accelerator.prepare(model, discriminator, opt_g, opt_d)
    vqgan: VQGAN = accelerator.unwrap_model(model)
    judge: PatchDiscriminator = accelerator.unwrap_model(discriminator)
    ema = build_ema(vqgan, c.ema)
    average = cast(VQGAN, ema.module)
    usage = Usage(config.model.vqgan.codebook_size).to(device)
    accelerator.register_for_checkpointing(ema, usage)
    if perceptual is not None:
        perceptual.to(device)

    fixed = fixed_settings(c, vqgan=config.model.vqgan)
    checkpoints = Checkpoints(accelerator, args.out, c.keep, fixed, asdict(config))
    start = checkpoints.load()
    order, part = Order(len(data), c.seed), own_part(accelerator, c.batch_size)
    batches = image_batches(data, lambda step: order.keys(step * c.batch_size, c.batch_size)[part], start, c.workers)
    if accelerator.is_main_process:
        log = Logger(args.out, c.steps, c.batch_size, start)
        shown = data.batch([(i * len(data) // 16, 0) for i in range(16)]).pixels.to(device)

    with Stop() as stop:
        for step in range(start, c.steps):
            x = next(batches).pixels.to(device)
            generator = seeded(c, step)
            set_lr(opt_g, c.lr * factor(step))
            set_lr(opt_d, c.disc_lr * factor(step))

            # The VQGAN's step.
            with accelerator.autocast():
                reconstruction, codebook, indices = model(x)
            reconstruction = reconstruction.float()
            l1 = F.l1_loss(reconstruction, x)
            similar = l1 + c.l2_weight * F.mse_loss(reconstruction, x)
            scalars = {"l1": l1.detach(), "codebook": codebook.detach()}
            if perceptual is not None:
                with accelerator.autocast():
                    distance = perceptual(*same_crop(reconstruction, x, c.perceptual_crop, generator)).mean()
                similar = similar + c.perceptual_weight * distance
                scalars["perceptual"] = distance.detach()
            loss = similar + codebook
            adversarial_phase = step >= c.disc_start
            if adversarial_phase:
                judge.requires_grad_(False)
                with accelerator.autocast():
                    adversarial = generator_loss(judge(reconstruction))
                weight = adaptive_weight(similar, adversarial, vqgan.decoder.conv_out.weight, mean)
                loss = loss + c.disc_weight * weight * adversarial
                scalars |= {"generator": adversarial.detach(), "adaptive_weight": weight}
            opt_g.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), c.grad_clip)
            opt_g.step()
            ema.update_parameters(vqgan)

            # The discriminator's step.
            if adversarial_phase:
                judge.requires_grad_(True)
                with accelerator.autocast():
                    real, fake = discriminator(torch.cat([x, reconstruction.detach()])).float().chunk(2)
                d_loss = discriminator_loss(real, fake)
                opt_d.zero_grad()
                accelerator.backward(d_loss)
                opt_d.step()
                scalars |= {
                    "discriminator": d_loss.detach(),
                    "real": real.detach().mean(),
                    "fake": fake.detach().mean(),
                }

            done = step + 1
            usage.count(indices)
            if c.revive_every and done % c.revive_every == 0:
                counts = accelerator.reduce(usage.counts, "sum")
                scalars["codes_used"] = (counts > 0).float().mean()
                if done < c.disc_start:
                    revive_codes(vqgan, counts, accelerator.gather(latents(vqgan, x)), generator)
                usage.counts.zero_()
            if done % c.log_every == 0:
                scalars = mean(scalars)
                if accelerator.is_main_process:
                    log.scalars(done, scalars)
            if accelerator.is_main_process and (done % c.sample_every == 0 or done == c.steps):
                log.picture(done, "reconstruction", reconstruction_grid(average, shown))
            stopping = stop.requested()
            if done % c.save_every == 0 or done == c.steps or stopping:
                check_finite(done, {"loss": loss.detach()})
                if accelerator.is_main_process:
                    export(average, args.out)
                checkpoints.save(done)
            if stopping:
                report_failures(accelerator, args.out, data.failures)
                stop.leave(f"step {done} of {c.steps} is saved in {args.out}")
    report_failures(accelerator, args.out, data.failures)


class Usage(nn.Module):
    """How often each code was chosen since the dead ones were last looked for; part of a checkpoint."""

    counts: Tensor

    def __init__(self, codes: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(codes))

    def count(self, indices: Tensor) -> None:
        """Add choices of any shape."""
        self.counts += torch.bincount(indices.flatten(), minlength=len(self.counts))


def same_crop(a: Tensor, b: Tensor, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One random square of both batches (B, C, H, W); the whole of them when `side` is 0 or they are no larger."""
    height, width = a.shape[-2:]
    if not 0 < side < min(height, width):
        return a, b
    y, x = (int(torch.randint(limit - side + 1, (), generator=generator)) for limit in (height, width))
    return a[..., y : y + side, x : x + side], b[..., y : y + side, x : x + side]


@torch.no_grad()
def latents(vqgan: VQGAN, x: Tensor) -> Tensor:
    """Where images (B, 3, H, W) lie among the codes, (B * T, embed_dim)."""
    z = vqgan.encode(x).float()
    if vqgan.quantizer.l2_codes:
        z = F.normalize(z, dim=1)
    return z.permute(0, 2, 3, 1).flatten(0, 2)


@torch.no_grad()
def revive_codes(vqgan: VQGAN, usage: Tensor, z: Tensor, generator: torch.Generator) -> None:
    """Move the codes that no latent chose onto some of the latents z (N, embed_dim); `usage` (V,) counts choices."""
    dead = (usage == 0).nonzero().flatten()
    count = min(len(dead), len(z))
    chosen = torch.randperm(len(z), generator=generator)[:count]
    vqgan.quantizer.embedding.weight[dead[:count]] = z[chosen.to(z.device)]


@torch.no_grad()
def reconstruction_grid(vqgan: VQGAN, x: Tensor) -> Image.Image:
    """Originals (B, 3, H, W) in the upper rows, their reconstructions below."""
    return grid(from_pixels(torch.cat([x, vqgan(x)[0].float()])), columns=8)


def export(vqgan: VQGAN, out: Path) -> None:
    """Write vqgan.safetensors and the configuration it was built from."""
    save_tensors(vqgan.state_dict(), out / "vqgan.safetensors")
    OmegaConf.save(OmegaConf.create(asdict(vqgan.config)), out / "vqgan.yaml")


if __name__ == "__main__":
    main()
