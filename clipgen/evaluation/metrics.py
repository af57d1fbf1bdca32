"""The arithmetic of evaluation: Frechet distance, Inception Score, R-precision, CLIP score, PSNR.

Statistics are accumulated in float64 and can be summed over processes, so figures do not depend on how images are
distributed. Nothing here runs a network. Shapes: N images, F features, C classes, D embedding.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

Sum = Callable[[Tensor], Tensor]
"""Sums a tensor over the processes."""
AMONG = 100
"""Prompts that R-precision chooses among."""


class Gaussian:
    """Mean and covariance of features, accumulated batch by batch."""

    def __init__(self, size: int) -> None:
        self.count = torch.zeros((), dtype=torch.float64)
        self.total = torch.zeros(size, dtype=torch.float64)
        self.products = torch.zeros(size, size, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Add the features (N, F) of some images."""
        x = features.detach().cpu().double()
        self.count += len(x)
        self.total += x.sum(0)
        self.products += x.t() @ x

    def share(self, add_up: Sum) -> None:
        """All-reduce the statistics over the processes, in place."""
        self.count, self.total, self.products = map(add_up, (self.count, self.total, self.products))

    @property
    def mean(self) -> Tensor:
        """(F,)."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """(F, F), unbiased, as NumPy's `cov`; zeros for a single image."""
        mean = self.mean
        return (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1).clamp(min=1)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Wasserstein-2 distance of two Gaussians: FID for Inception's features (Heusel et al., arXiv 1706.08500).

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), the last trace by the eigenvalues of C_a^(1/2) C_b C_a^(1/2),
    which are real and not negative even with fewer images than features.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.t()
    shared = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * shared
    return max(0.0, float(distance))


def class_score(logits: Tensor, splits: int) -> tuple[float, float]:
    """Inception Score (Salimans et al., arXiv 1606.03498) by torch-fidelity: exp E KL(p(class | image) || p(class)).

    Mean and standard deviation over at most N random splits of the images' logits (N, C).
    """
    from torch_fidelity.metric_isc import isc_features_to_metric

    found = isc_features_to_metric(logits, splits=splits)
    return float(found["inception_score_mean"]), float(found["inception_score_std"])


def r_precision(images: Tensor, prompts: Tensor) -> tuple[float, int]:
    """Share of the images whose own prompt is the nearest among itself and random others (R = 1).

    Xu et al. (AttnGAN, arXiv 1711.10485) with CLIP's embeddings (Park et al., NeurIPS 2021).
    Equal prompts count as one, and are not compared with each other.

    Args:
        images: (N, D) unit norm; prompts: (N, D) unit norm, in the same order.

    Returns:
        The share, and the number of prompts compared, which is below `AMONG` if there are fewer different ones.
    """
    different, kinds = torch.unique(prompts.cpu().float(), dim=0, return_inverse=True)
    rivals = min(AMONG, len(different)) - 1
    hits = 0
    for rows in torch.arange(len(images)).split(256):
        places = [random.Random(f"0-{i}").sample(range(len(different) - 1), rivals) for i in rows.tolist()]
        own, others = kinds[rows, None], torch.tensor(places, dtype=torch.long).view(len(rows), rivals)
        others = others + (others >= own)  # all but its own
        near = images[rows].cpu().float() @ different.t()
        hits += int((near.gather(1, own) > near.gather(1, others)).all(1).sum())
    return hits / len(images), rivals + 1


def clip_score(cosines: Tensor) -> float:
    """CLIPScore, 2.5 * max(cosine, 0), averaged over (N,) images (Hessel et al., arXiv 2104.08718)."""
    return float(2.5 * cosines.double().clamp(min=0).mean())


def psnr(a: Tensor, b: Tensor, span: float = 255) -> Tensor:
    """Peak signal-to-noise ratio of pairs of images (N, C, H, W): (N,) dB, 100 for equal ones.

    `span` is the range of the values: 255 for bytes, 2 for pixels in [-1, 1].
    """
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return (10 * torch.log10(span**2 / error)).clamp(max=100)
