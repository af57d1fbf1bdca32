"""The adversarial half of stage 1: what the discriminator tells the VQGAN, and its own step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor

from clipgen.models.vqgan import VQGAN
from train.config import Stage1Config
from train.loop.common import in_parts, means
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
        vqgan: the bare model, outside of what shares it among processes.
        discriminator: as the accelerator prepared it; it learns in `step` only.
    """

    config: Stage1Config
    accelerator: Accelerator
    vqgan: VQGAN
    discriminator: torch.nn.Module
    optimizer: torch.optim.Optimizer
    likeness: ReconstructionLoss
    lecam: LeCam

    def __post_init__(self) -> None:
        self._judge: PatchDiscriminator = self.accelerator.unwrap_model(self.discriminator)
        self._mean = partial(self.accelerator.reduce, reduction="mean")
        self._last = self.vqgan.decoder.conv_out.weight
        self._judge.requires_grad_(False)

    def whole_weight(self, parts: Sequence[Tensor], crop: Crop | None) -> Tensor | None:
        """The adaptive weight of a batch that is taken in parts, before the first of them; None for a single part.

        It costs another pass through the decoder: the weight is a ratio of gradients of the whole batch, and no part
        can be learned from without it.
        """
        if len(parts) == 1:
            return None
        return adaptive_weight((self._glance(x, crop) for x in parts), self._last, self._mean, self._scale())

    def _glance(self, x: Tensor, crop: Crop | None) -> tuple[Tensor, Tensor]:
        with self.accelerator.autocast():
            with torch.no_grad():
                z, _, _ = self.vqgan.quantizer(self.vqgan.encode(x))
            y = self.vqgan.decode(z)
            return self.likeness(y, x, crop)[0], generator_loss(self._judge(y.float()))

    def _scale(self) -> float:
        scaler = self.accelerator.scaler
        return scaler.get_scale() if scaler is not None else 1.0

    def loss(self, unlike: Tensor, y: Tensor, weight: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """What the VQGAN is to lower besides, a scalar, and what is worth knowing of it.

        Args:
            unlike: how unlike the reconstructions are, a scalar that depends on the decoder.
            y: the reconstructions, (B, 3, H, W).
            weight: of `whole_weight`.
        """
        with self.accelerator.autocast():
            adversarial = generator_loss(self._judge(y.float()))
        if weight is None:
            weight = adaptive_weight([(unlike, adversarial)], self._last, self._mean, self._scale())
        scalars = {"generator": adversarial.detach(), "adaptive_weight": weight}
        return self.config.disc_weight * weight * adversarial, scalars

    def step(self, parts: Sequence[Tensor], fakes: Sequence[Tensor]) -> dict[str, Tensor]:
        """Let the discriminator learn from pictures and their reconstructions, in parts (B, 3, H, W)."""
        c, found = self.config, []
        self._judge.requires_grad_(True)
        self.optimizer.zero_grad()
        pairs = list(zip(parts, fakes, strict=True))
        for x, y in in_parts(self.accelerator, self.discriminator, pairs):
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
            found.append(scalars)
        self.optimizer.step()
        self._judge.requires_grad_(False)
        scalars = means(found)
        if c.disc_regularisation == "lecam":
            self.lecam.update(self._mean(scalars["real"]), self._mean(scalars["fake"]))
        return scalars
