"""Stage 1: images -> VQGAN.

    python train/stage1.py --config mini --data data/emoji/train --out runs/vqgan
    python train/stage1.py --config coco --data photos --out runs/vqgan stage1.batch_size=8

Run it again to resume. The weights are in OUT/vqgan.safetensors (the moving average), the curves in OUT/scalars.csv
and OUT/tensorboard, reconstructions (above: the originals) in OUT/reconstruction_*.png.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from clipgen.images import from_pixels, grid
from clipgen.vqgan import VQGAN
from train.common import (
    Logger,
    build_accelerator,
    build_ema,
    command,
    cosine,
    init_weights,
    load_checkpoint,
    parse_args,
    save_checkpoint,
    save_tensors,
)
from train.data import Images, image_batches
from train.losses import PatchDiscriminator, adaptive_weight, build_perceptual, discriminator_loss, generator_loss


@command
def main() -> None:
    args, config = parse_args(__doc__ or "")
    c = config.stage1
    accelerator = build_accelerator(c)
    data = Images(args.data, config.model.vqgan.image_size, c.min_scale)

    model = VQGAN(config.model.vqgan)
    init_weights(model, c)
    discriminator = PatchDiscriminator(c.disc_ch)
    perceptual = build_perceptual(c.perceptual)
    opt_g = torch.optim.Adam(model.parameters(), c.lr, betas=(c.betas[0], c.betas[1]))
    opt_d = torch.optim.Adam(discriminator.parameters(), c.disc_lr, betas=(0.5, 0.9))
    factor = cosine(c)
    schedule_g = LambdaLR(opt_g, factor)
    schedule_d = LambdaLR(opt_d, lambda done: factor(c.disc_start + done))
    model, discriminator, opt_g, opt_d, schedule_g, schedule_d = accelerator.prepare(
        model, discriminator, opt_g, opt_d, schedule_g, schedule_d
    )
    vqgan: VQGAN = accelerator.unwrap_model(model)
    ema = build_ema(vqgan, c.ema)
    average = cast(VQGAN, ema.module)
    usage = torch.zeros(config.model.vqgan.codebook_size, device=accelerator.device)
    accelerator.register_for_checkpointing(ema)
    if perceptual is not None:
        perceptual.to(accelerator.device)

    start = load_checkpoint(accelerator, args.out)
    batches = iter(image_batches(data, c.batch_size, c.seed, start * c.batch_size, c.workers))
    fixed = torch.stack([data[(i * (len(data) // 16), 0)] for i in range(16)]).to(accelerator.device)
    log = Logger(args.out, c.steps, c.batch_size)

    for step in range(start, c.steps):
        x = next(batches).to(accelerator.device)

        # The VQGAN's step.
        with accelerator.autocast():
            reconstruction, codebook, indices = model(x)
        reconstruction = reconstruction.float()
        l1 = F.l1_loss(reconstruction, x)
        similar = l1 + c.l2_weight * F.mse_loss(reconstruction, x)
        scalars = {"l1": l1.detach(), "codebook": codebook.detach()}
        if perceptual is not None:
            with accelerator.autocast():
                distance = perceptual(*same_crop(reconstruction, x, c.perceptual_crop)).mean()
            similar = similar + c.perceptual_weight * distance
            scalars["perceptual"] = distance.detach()
        loss = similar + codebook
        adversarial_phase = step >= c.disc_start
        if adversarial_phase:
            discriminator.requires_grad_(False)
            with accelerator.autocast():
                adversarial = generator_loss(discriminator(reconstruction))
            weight = adaptive_weight(similar, adversarial, vqgan.decoder.conv_out.weight)
            loss = loss + c.disc_weight * weight * adversarial
            scalars |= {"generator": adversarial.detach(), "adaptive_weight": weight}
        opt_g.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), c.grad_clip)
        opt_g.step()
        schedule_g.step()
        ema.update_parameters(vqgan)

        # The discriminator's step.
        if adversarial_phase:
            discriminator.requires_grad_(True)
            with accelerator.autocast():
                real, fake = discriminator(x), discriminator(reconstruction.detach())
            d_loss = discriminator_loss(real.float(), fake.float())
            opt_d.zero_grad()
            accelerator.backward(d_loss)
            opt_d.step()
            schedule_d.step()
            scalars |= {"discriminator": d_loss.detach(), "real": real.mean().detach(), "fake": fake.mean().detach()}

        usage += torch.bincount(indices.flatten(), minlength=len(usage))
        done = step + 1
        if c.revive_every and done % c.revive_every == 0:
            scalars["codes_used"] = (usage > 0).float().mean()
            if done < c.disc_start:
                revive_codes(vqgan, usage, x)
            usage.zero_()
        if accelerator.is_main_process and done % c.log_every == 0:
            log.scalars(done, scalars)
        if accelerator.is_main_process and (done % c.sample_every == 0 or done == c.steps):
            log.picture(done, "reconstruction", reconstruction_grid(average, fixed))
        if done % c.save_every == 0 or done == c.steps:
            save_checkpoint(accelerator, args.out, done, config)
            if accelerator.is_main_process:
                export(average, args.out)


def same_crop(a: Tensor, b: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """One random square of both batches (B, C, H, W); the whole of them when `side` is 0 or they are no larger."""
    height, width = a.shape[-2:]
    if not 0 < side < min(height, width):
        return a, b
    y, x = (int(torch.randint(limit - side + 1, ())) for limit in (height, width))
    return a[..., y : y + side, x : x + side], b[..., y : y + side, x : x + side]


@torch.no_grad()
def revive_codes(vqgan: VQGAN, usage: Tensor, x: Tensor) -> None:
    """Move the codes that no latent chose onto latents of this batch; `usage` (V,) counts choices."""
    dead = (usage == 0).nonzero().flatten()
    z = vqgan.encode(x).float()
    if vqgan.quantizer.l2_codes:
        z = F.normalize(z, dim=1)
    z = z.permute(0, 2, 3, 1).flatten(0, 2)  # (N, embed_dim)
    count = min(len(dead), len(z))
    vqgan.quantizer.embedding.weight[dead[:count]] = z[torch.randperm(len(z))[:count]]


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
