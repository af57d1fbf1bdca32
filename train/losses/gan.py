"""The adversarial half of stage 1: the generator's loss with its adaptive weight, and the discriminator's step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor

from clipgen.models.vqgan import VQGAN
from train.config import Stage1Config
from train.loop.batches import mean_scalars, micro_batches
from train.losses.stage1 import (
    Crop,
    LeCam,
    PatchDiscriminator,
    ReconstructionLoss,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    r1_penalty,
)


@dataclass
class Gan:
    """Hinge GAN with an adaptive weight (Esser et al., arXiv 2012.09841, section 3.1).

    Attributes:
        vqgan: the bare model, without its DDP wrapper.
        discriminator: as the accelerator prepared it; it is trained in `step` only.
    """

    config: Stage1Config
    accelerator: Accelerator
    vqgan: VQGAN
    discriminator: torch.nn.Module
    optimizer: torch.optim.Optimizer
    reconstruction_loss: ReconstructionLoss
    lecam: LeCam

    def __post_init__(self) -> None:
        self._bare_discriminator: PatchDiscriminator = self.accelerator.unwrap_model(self.discriminator)
        self._all_reduce_mean = partial(self.accelerator.reduce, reduction="mean")
        self._last_layer = self.vqgan.decoder.conv_out.weight
        self._bare_discriminator.requires_grad_(False)

    def batch_weight(self, parts: Sequence[Tensor], crop: Crop | None) -> Tensor | None:
        """Adaptive weight of a batch that is split into micro-batches, before the first of them; None if it is not.

        The weight is a ratio of gradients of the whole batch, so this costs one more pass through the decoder.
        """
        if len(parts) == 1:
            return None
        losses = (self._both_losses(x, crop) for x in parts)
        return adaptive_weight(losses, self._last_layer, self._all_reduce_mean, self._loss_scale())

    def _both_losses(self, x: Tensor, crop: Crop | None) -> tuple[Tensor, Tensor]:
        """Reconstruction loss and generator loss of images (B, 3, H, W)."""
        with self.accelerator.autocast():
            with torch.no_grad():
                z, _, _ = self.vqgan.quantizer(self.vqgan.encode(x))
            y = self.vqgan.decode(z)
            return self.reconstruction_loss(y, x, crop)[0], generator_loss(self._bare_discriminator(y.float()))

    def _loss_scale(self) -> float:
        scaler = self.accelerator.scaler
        return scaler.get_scale() if scaler is not None else 1.0

    def loss(self, reconstruction: Tensor, y: Tensor, weight: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted generator loss, a scalar, and scalars for the log.

        Args:
            reconstruction: the reconstruction loss, a scalar that depends on the decoder.
            y: the reconstructions, (B, 3, H, W).
            weight: what `batch_weight` returned; computed here if None.
        """
        with self.accelerator.autocast():
            adversarial = generator_loss(self._bare_discriminator(y.float()))
        if weight is None:
            losses = [(reconstruction, adversarial)]
            weight = adaptive_weight(losses, self._last_layer, self._all_reduce_mean, self._loss_scale())
        scalars = {"generator": adversarial.detach(), "adaptive_weight": weight}
        return self.config.disc_weight * weight * adversarial, scalars

    def step(self, parts: Sequence[Tensor], fakes: Sequence[Tensor]) -> dict[str, Tensor]:
        """Train the discriminator on images and their reconstructions, micro-batches of (B, 3, H, W)."""
        c, rows = self.config, []
        self._bare_discriminator.requires_grad_(True)
        self.optimizer.zero_grad()
        pairs = list(zip(parts, fakes, strict=True))
        for x, y in micro_batches(self.accelerator, self.discriminator, pairs):
            x = x.detach().requires_grad_(c.disc_regularisation == "r1")
            with self.accelerator.autocast():
                real, fake = self.discriminator(torch.cat([x, y])).float().chunk(2)
            loss = discriminator_loss(real, fake)
            scalars = {"discriminator": loss.detach(), "real": real.detach().mean(), "fake": fake.detach().mean()}
            if c.disc_regularisation != "none":
                penalty = r1_penalty(real, x) if c.disc_regularisation == "r1" else self.lecam(real, fake)
                loss = loss + c.disc_regularisation_weight * penalty
                scalars["disc_penalty"] = penalty.detach()
            self.accelerator.backward(loss / len(parts))
            rows.append(scalars)
        self.optimizer.step()
        # Otherwise the VQGAN's next step, which unscales all gradients, would find an overflow of these once more and
        # lower the loss scale twice.
        self.optimizer.zero_grad()
        self._bare_discriminator.requires_grad_(False)
        scalars = mean_scalars(rows)
        if c.disc_regularisation == "lecam":
            self.lecam.update(self._all_reduce_mean(scalars["real"]), self._all_reduce_mean(scalars["fake"]))
        return scalars
