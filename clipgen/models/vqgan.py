"""VQGAN: encode images to tokens and decode them (Esser et al., "Taming Transformers", arXiv 2012.09841).

Shapes: B batch, T tokens, V codebook size, C H W as usual. Pixels are in [-1, 1].
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from clipgen.config import VQGANConfig


def _norm(config: VQGANConfig, channels: int) -> nn.Module:
    return nn.GroupNorm(32, channels, config.norm_eps) if config.norm == "group" else nn.Identity()


def _zero(layer: nn.Conv2d | nn.Linear) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _silu(x: Tensor) -> Tensor:
    # In place where no gradient needs the input: allocating such large maps costs more than the arithmetic.
    return F.silu(x, inplace=not torch.is_grad_enabled())


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, 2H, 2W)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H/2, W/2)
        # One-sided padding: every published checkpoint was trained with it.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class ResBlock(nn.Module):
    def __init__(self, config: VQGANConfig, in_channels: int, out_channels: int, kernel: int = 3) -> None:
        super().__init__()
        self.norm1 = _norm(config, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
        self.norm2 = _norm(config, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel, padding=kernel // 2)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        if config.norm == "none":  # nothing keeps the sums in bounds, so they grow from zero
            _zero(self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        h = self.conv1(F.silu(x) if h is x else _silu(h))  # x is still needed
        h = self.conv2(_silu(self.norm2(h)))
        return h.add_(self.shortcut(x))


class AttnBlock(nn.Module):
    """Self-attention over all positions, with one head."""

    def __init__(self, config: VQGANConfig, channels: int) -> None:
        super().__init__()
        self.norm = _norm(config, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        if config.norm == "none":
            _zero(self.proj)

    def forward(self, x: Tensor) -> Tensor:
        y = rearrange(self.norm(x), "b c h w -> b (h w) c")
        q, k, v = self.qkv(y).chunk(3, dim=-1)
        y = self.proj(F.scaled_dot_product_attention(q, k, v))
        return x + rearrange(y, "b (h w) c -> b c h w", h=x.shape[2])


def _middle(config: VQGANConfig, channels: int) -> nn.Sequential:
    return nn.Sequential(
        ResBlock(config, channels, channels), AttnBlock(config, channels), ResBlock(config, channels, channels)
    )


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> features (B, z_channels, grid, grid)."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        c = config
        kernel = 1 if c.local_encoder else 3
        self.unshuffle = nn.PixelUnshuffle(c.patch)
        self.conv_in = nn.Conv2d(3 * c.patch**2, c.ch, kernel, padding=kernel // 2)
        resolution, channels = c.image_size // c.patch, c.ch
        down: list[nn.Module] = []
        for level, mult in enumerate(c.ch_mult):
            for _ in range(c.num_res_blocks):
                down.append(ResBlock(c, channels, c.ch * mult, kernel))
                channels = c.ch * mult
                if resolution in c.attn_resolutions:
                    down.append(AttnBlock(c, channels))
            if level < len(c.ch_mult) - 1:
                down.append(Downsample(channels))
                resolution //= 2
        self.down = nn.Sequential(*down)
        self.mid = ResBlock(c, channels, channels, kernel) if c.local_encoder else _middle(c, channels)
        self.norm_out = _norm(c, channels)
        self.conv_out = nn.Conv2d(channels, c.z_channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mid(self.down(self.conv_in(self.unshuffle(x))))
        return self.conv_out(_silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Features (B, z_channels, grid, grid) -> images (B, 3, H, W)."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        c = config
        resolution, channels = c.grid, c.ch * c.ch_mult[-1]
        self.conv_in = nn.Conv2d(c.z_channels, channels, 3, padding=1)
        self.mid = _middle(c, channels)
        up: list[nn.Module] = []
        for level, mult in reversed(list(enumerate(c.ch_mult))):
            for _ in range(c.num_res_blocks + 1):
                up.append(ResBlock(c, channels, c.ch * mult))
                channels = c.ch * mult
                if resolution in c.attn_resolutions:
                    up.append(AttnBlock(c, channels))
            if level > 0:
                up.append(Upsample(channels))
                resolution *= 2
        self.up = nn.Sequential(*up)
        self.norm_out = _norm(c, channels)
        self.conv_out = nn.Conv2d(channels, 3 * c.patch**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(c.patch)

    def forward(self, z: Tensor) -> Tensor:
        h = self.up(self.mid(self.conv_in(z)))
        return self.shuffle(self.conv_out(_silu(self.norm_out(h))))


class Quantizer(nn.Module):
    """Nearest-code lookup, optionally on the unit sphere (arXiv 2110.04627)."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.beta = config.beta
        self.l2_codes = config.l2_codes
        self.embedding = nn.Embedding(config.codebook_size, config.embed_dim)
        if self.l2_codes:
            nn.init.normal_(self.embedding.weight)
        else:
            nn.init.uniform_(self.embedding.weight, -1 / config.codebook_size, 1 / config.codebook_size)

    def codes(self) -> Tensor:
        """The codebook (V, embed_dim), on the unit sphere if `l2_codes`."""
        weight = self.embedding.weight
        return F.normalize(weight, dim=-1) if self.l2_codes else weight

    def nearest(self, z: Tensor) -> Tensor:
        """Indices of the nearest codes: (N, embed_dim) -> (N,)."""
        codes = self.codes().float()
        # argmin |z - e|^2 without the constant |z|^2. In float32 also where training uses autocast, which would lower
        # the product to bfloat16 and choose other codes for one latent in nine.
        with torch.autocast("cpu" if z.is_meta else z.device.type, enabled=False):
            return torch.addmm(codes.pow(2).sum(1), z.float(), codes.t(), beta=1, alpha=-2).argmin(1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize latents (B, C, h, w), normalised first if `l2_codes`.

        Returns:
            Codes (B, C, h, w) with a straight-through gradient to `z`; the loss, a scalar, in which the codebook term
            has weight beta and the commitment term 1, as in both reference implementations; indices (B, h*w).
        """
        z = z.float()
        if self.l2_codes:
            z = F.normalize(z, dim=1)
        b, _, h, w = z.shape
        indices = rearrange(self.nearest(rearrange(z, "b c h w -> (b h w) c")), "(b t) -> b t", b=b)
        z_q = self.lookup(indices, h, w)
        loss = F.mse_loss(z, z_q.detach()) + self.beta * F.mse_loss(z_q, z.detach())
        return z + (z_q - z).detach(), loss, indices

    def lookup(self, indices: Tensor, h: int, w: int) -> Tensor:
        """Look up codes: indices (B, h*w) -> (B, C, h, w)."""
        return rearrange(F.embedding(indices, self.codes()), "b (h w) c -> b c h w", h=h, w=w).contiguous()


class VQGAN(nn.Module):
    """The image tokenizer. The discriminator it is trained with is in `train.losses`."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.quantizer = Quantizer(config)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)
        self.decoder = Decoder(config)

    def prepack(self) -> VQGAN:
        """Prepare for decoding: in reduced precision, convolutions are fastest with weights in channels-last layout."""
        if self.post_quant_conv.weight.dtype != torch.float32:
            for parameter in self.parameters():
                if parameter.ndim == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return self

    def encode(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> latents (B, embed_dim, grid, grid)."""
        return self.quant_conv(self.encoder(x))

    def decode(self, z_q: Tensor) -> Tensor:
        """Codes (B, embed_dim, grid, grid) -> images (B, 3, H, W), about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(z_q))

    def encode_tokens(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> tokens (B, T), row by row."""
        return self.quantizer(self.encode(x))[2]

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) -> images (B, 3, H, W), about in [-1, 1]."""
        grid = self.config.grid
        return self.decode(self.quantizer.lookup(tokens, grid, grid).to(self.post_quant_conv.weight.dtype))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images -> (reconstruction (B, 3, H, W), codebook loss, tokens (B, T))."""
        z_q, loss, indices = self.quantizer(self.encode(x))
        return self.decode(z_q), loss, indices
