"""The codebook while it is trained: what is in use, what becomes of the rest, and codes as moving averages."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from clipgen.models.vqgan import VQGAN, Quantizer

Sum = Callable[[Tensor], Tensor]
"""Adds up a tensor over all processes."""


class CodeUsage(nn.Module):
    """How often each code was chosen, since the dead ones were last looked for and since the last log line.

    Part of a checkpoint.
    """

    counts: Tensor
    recent: Tensor

    def __init__(self, codes: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(codes))
        self.register_buffer("recent", torch.zeros(codes))

    def count(self, indices: Tensor) -> None:
        """Add choices of any shape."""
        found = torch.bincount(indices.flatten(), minlength=len(self.counts))
        self.counts += found
        self.recent += found

    def report(self, total: Sum) -> dict[str, Tensor]:
        """Of the steps since the last report: the share of the codes that are used, and their perplexity, 1 to V."""
        counts = total(self.recent.clone())
        self.recent.zero_()
        return {"codes_used": (counts > 0).float().mean(), "perplexity": perplexity(counts)}


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of choices (V,): how many codes, used equally, would say as much."""
    share = counts / counts.sum()
    return torch.special.entr(share).sum().exp()


def vectors(quantizer: Quantizer, z: Tensor) -> Tensor:
    """Latents (B, C, h, w) as the quantizer compares them, (B * h * w, C)."""
    z = z.float().permute(0, 2, 3, 1).flatten(0, 2)
    return F.normalize(z, dim=1) if quantizer.l2_codes else z


@torch.no_grad()
def latents(vqgan: VQGAN, x: Tensor) -> Tensor:
    """Where images (B, 3, H, W) lie among the codes, (B * T, embed_dim)."""
    return vectors(vqgan.quantizer, vqgan.encode(x))


@torch.no_grad()
def revive_codes(quantizer: Quantizer, usage: Tensor, z: Tensor, generator: torch.Generator) -> Tensor:
    """Move the codes that no latent chose onto some of the latents z (N, embed_dim); which ones, (M,).

    Args:
        usage: choices of each code, (V,).
    """
    dead = (usage == 0).nonzero().flatten()[: len(z)]
    chosen = torch.randperm(len(z), generator=generator)[: len(dead)]
    quantizer.embedding.weight[dead] = z[chosen.to(z.device)]
    return dead


class AverageCodes(nn.Module):
    """Codes that are moving averages of the latents that chose them; part of a checkpoint.

    With n latents in a step that choose a code, of sum m: N = d N + (1 - d) n, M = d M + (1 - d) m, code = M / N
    (van den Oord et al., arXiv 1711.00937, appendix A.1, eqs. 6 to 8), N smoothed so that no code is divided by 0. With
    unit-norm codes that is their mean direction. The codes get no gradient; make this before anything looks for
    parameters to train.
    """

    sizes: Tensor
    sums: Tensor

    def __init__(self, quantizer: Quantizer, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        weight = quantizer.embedding.weight.requires_grad_(False)
        self.register_buffer("sizes", torch.ones(len(weight)))
        self.register_buffer("sums", quantizer.codes().detach().clone())
        self._found = [torch.zeros(0), torch.zeros(0)]

    def watch(self, quantizer: Quantizer) -> None:
        """Note what the quantizer is given in training, where gradients are kept, from now on."""
        self._quantizer = [quantizer]  # not as a part of this module: it is saved with the VQGAN
        self._clear()
        quantizer.register_forward_hook(self._note)

    def _clear(self) -> None:
        self._found = [torch.zeros_like(self.sizes), torch.zeros_like(self.sums)]

    @torch.no_grad()
    def _note(self, quantizer: nn.Module, inputs: tuple[Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        if inputs[0].requires_grad:
            indices = output[2].flatten()
            self._found[0] += torch.bincount(indices, minlength=len(self.sizes))
            self._found[1].index_add_(0, indices, vectors(self._quantizer[0], inputs[0]))

    @torch.no_grad()
    def update(self, total: Sum) -> None:
        """Move the codes by what was noted since the last update, of all processes."""
        self.sizes.lerp_(total(self._found[0]), 1 - self.decay)
        self.sums.lerp_(total(self._found[1]), 1 - self.decay)
        self._clear()
        every, small = self.sizes.sum(), 1e-5
        smoothed = (self.sizes + small) / (every + len(self.sizes) * small) * every
        self._quantizer[0].embedding.weight.copy_(self.sums / smoothed[:, None])

    @torch.no_grad()
    def restart(self, codes: Tensor) -> None:
        """Begin the averages of codes (M,) that were moved anew, where they are now."""
        self.sizes[codes] = 1.0
        self.sums[codes] = self._quantizer[0].codes()[codes]
