"""The codebook during training: usage, revival of unused codes, and codes as moving averages."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from clipgen.models.vqgan import VQGAN, Quantizer

AllReduce = Callable[[Tensor], Tensor]
"""Sum a tensor over all processes."""


class CodeUsage(nn.Module):
    """How often each code was chosen: since the last revival, and since the last log line.

    A module, so that its counts are saved in checkpoints.
    """

    counts: Tensor
    """Since unused codes were last revived, (V,)."""
    recent: Tensor
    """Since the last log line, (V,)."""

    def __init__(self, codebook_size: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(codebook_size))
        self.register_buffer("recent", torch.zeros(codebook_size))

    def update(self, indices: Tensor) -> None:
        """Count chosen codes, an index tensor of any shape."""
        chosen = count_codes(indices, len(self.counts))
        self.counts += chosen
        self.recent += chosen

    def gather(self, all_reduce: AllReduce, is_main: bool) -> None:
        """Move the counts of all processes to the main one, the only one whose counts a checkpoint holds."""
        for counts in (self.counts, self.recent):
            total = all_reduce(counts.clone())
            counts.copy_(total) if is_main else counts.zero_()

    def clear(self) -> None:
        """Start counting afresh."""
        self.counts.zero_()
        self.recent.zero_()

    def report(self, all_reduce: AllReduce) -> dict[str, Tensor]:
        """Fraction of codes used and their perplexity (1 to V) since the last report; then start counting afresh."""
        counts = all_reduce(self.recent.clone())
        self.recent.zero_()
        return {"codes_used": (counts > 0).float().mean(), "perplexity": perplexity(counts)}


def count_codes(indices: Tensor, codebook_size: int) -> Tensor:
    """How often each code occurs in an index tensor of any shape: (V,) float32."""
    chosen = indices.flatten()
    # bincount would wait for the GPU to learn the largest index; this does not.
    return torch.zeros(codebook_size, device=chosen.device).index_add_(
        0, chosen, torch.ones(len(chosen), device=chosen.device)
    )


def perplexity(counts: Tensor) -> Tensor:
    """Exponential of the entropy of code counts (V,): the effective number of codes in use."""
    probabilities = counts / counts.sum()
    return torch.special.entr(probabilities).sum().exp()


def flatten_latents(quantizer: Quantizer, z: Tensor) -> Tensor:
    """Latents (B, C, h, w) as the vectors that the quantizer compares with its codes, (B * h * w, C) float32."""
    z = rearrange(z.float(), "b c h w -> (b h w) c")
    return F.normalize(z, dim=1) if quantizer.l2_codes else z


@torch.no_grad()
def encode_latents(vqgan: VQGAN, x: Tensor) -> Tensor:
    """Latent vectors of images (B, 3, H, W) in [-1, 1] before quantization, (B * T, embed_dim)."""
    return flatten_latents(vqgan.quantizer, vqgan.encode(x))


@torch.no_grad()
def revive_codes(quantizer: Quantizer, counts: Tensor, z: Tensor, generator: torch.Generator) -> Tensor:
    """Move unused codes onto randomly chosen latents z (N, embed_dim).

    Args:
        counts: how often each code was chosen, (V,).

    Returns:
        The indices of the codes that were moved, (M,).
    """
    unused = (counts == 0).nonzero().flatten()[: len(z)]
    chosen = torch.randperm(len(z), generator=generator)[: len(unused)]
    quantizer.embedding.weight[unused] = z[chosen.to(z.device)]
    return unused


class EMACodebook(nn.Module):
    """Codes as exponential moving averages of the latents that chose them, instead of learned by gradient.

    With n latents of sum m choosing a code in a step: N = d N + (1 - d) n, M = d M + (1 - d) m, code = M / N
    (van den Oord et al., arXiv 1711.00937, appendix A.1, eqs. 6 to 8). N is Laplace-smoothed, so that no code is
    divided by 0. With unit-norm codes the result is the mean direction. Create this before collecting the parameters
    to train: it takes the gradient from the codes. A module, so that the averages are saved in checkpoints.
    """

    sizes: Tensor
    sums: Tensor

    def __init__(self, quantizer: Quantizer, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        weight = quantizer.embedding.weight.requires_grad_(False)
        self.register_buffer("sizes", torch.ones(len(weight)))
        self.register_buffer("sums", quantizer.codes().detach().clone())
        self._clear()

    def attach(self, quantizer: Quantizer) -> None:
        """Record from now on what the quantizer chooses in training, that is, for latents with a gradient."""
        self._quantizer = [quantizer]  # in a list, so that it is not a submodule: it is saved with the VQGAN
        self._clear()
        quantizer.register_forward_hook(self._record)

    def _clear(self) -> None:
        self._new_sizes, self._new_sums = torch.zeros_like(self.sizes), torch.zeros_like(self.sums)

    @torch.no_grad()
    def _record(self, quantizer: nn.Module, inputs: tuple[Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        if inputs[0].requires_grad:
            indices = output[2].flatten()
            self._new_sizes += count_codes(indices, len(self.sizes))
            self._new_sums.index_add_(0, indices, flatten_latents(self._quantizer[0], inputs[0]))

    @torch.no_grad()
    def update(self, all_reduce: AllReduce) -> None:
        """Move the codes by what all processes recorded since the last update."""
        self.sizes.lerp_(all_reduce(self._new_sizes), 1 - self.decay)
        self.sums.lerp_(all_reduce(self._new_sums), 1 - self.decay)
        self._clear()
        total, epsilon = self.sizes.sum(), 1e-5
        smoothed = (self.sizes + epsilon) / (total + len(self.sizes) * epsilon) * total
        self._quantizer[0].embedding.weight.copy_(self.sums / smoothed[:, None])

    @torch.no_grad()
    def reset(self, codes: Tensor) -> None:
        """Reset the averages of revived codes (M,) to their current values."""
        self.sizes[codes] = 1.0
        self.sums[codes] = self._quantizer[0].codes()[codes]
