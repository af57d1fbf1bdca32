"""Settings of the two training stages, checked when they are built."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from clipgen.config import (
    ModelConfig,
    build,
    find_config,
    read_yaml,
    require,
    require_choice,
    require_sizes,
    require_weights,
)


@dataclass
class TrainConfig:
    """Settings of both stages."""

    steps: int = 100_000
    batch_size: int = 64
    """Images per step over all processes."""
    accumulate: int = 1
    """Micro-batches that each process splits its part of a batch into: the same step in less memory."""
    recompute: bool = False
    """Recompute activations in the backward pass instead of storing them (gradient checkpointing)."""
    held_out: int = 512
    """Images held out for validation, at most a twentieth of all; with 0 training images are used."""
    init: str = ""
    """Weights to start from, a .safetensors file of the same model; empty for random ones."""
    lr: float = 1e-4
    warmup: int = 500
    seed: int = 0
    ema: float = 0.999
    grad_clip: float = 1.0
    precision: str = "bf16"
    workers: int = 2
    log_every: int = 50
    sample_every: int = 1000
    save_every: int = 1000
    keep: int = 2
    """How many of the newest checkpoints are kept."""
    patience: int = 10
    """Consecutive log lines with the same symptom (train/loop/health.py) before training stops; 0 only warns."""

    def __post_init__(self) -> None:
        require_sizes(self, "steps", "batch_size", "accumulate", "log_every", "sample_every", "save_every", "keep")
        require_sizes(self, "warmup", "seed", "workers", "held_out", "patience", at_least=0)
        for name in ("lr", "grad_clip"):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, f"{name} is {value}; it must be positive")
        require(0 <= self.ema < 1, f"ema is {self.ema}; use [0, 1)")
        if self.precision == "False":  # YAML reads a bare "no" as false
            self.precision = "no"
        require_choice(self, "precision", "no", "bf16", "fp16")


@dataclass
class Stage1Config(TrainConfig):
    """Settings of stage 1: L1 + perceptual + codebook loss, and from `disc_start` on a hinge GAN."""

    betas: list[float] = field(default_factory=lambda: [0.5, 0.9])
    """Of the generator's Adam; the discriminator uses the paper's (0.5, 0.9)."""
    min_scale: float = 0.8
    """Smallest side of a random crop, as a fraction of the image's shorter side."""
    l2_weight: float = 0.0
    perceptual: str = "efficientnet"
    perceptual_weight: float = 1.0
    perceptual_crop: int = 0
    """Side of the random crop whose perceptual features are compared, px; 0 for whole images."""
    disc_start: int = 50_000
    disc_weight: float = 0.8
    disc_ch: int = 64
    disc_lr: float = 1e-4
    disc_regularisation: str = "none"
    """none, r1 (arXiv 1801.04406) or lecam (arXiv 2104.03310): keeps the discriminator from winning on few images."""
    disc_regularisation_weight: float = 0.0
    """For example 10 for r1, 0.01 for lecam."""
    codes: str = "gradient"
    """How codes are learned: by gradient, or ema, as moving averages of their latents (arXiv 1711.00937)."""
    revive_every: int = 200
    """Before `disc_start`, codes that went unused for this many steps move onto latents; 0 never moves them."""
    only_decoder: bool = False
    """Train the decoder of `init` alone: encoder and codes stay, so the tokens that a GPT has learned do too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.disc_ch >= 4 and self.disc_ch % 4 == 0,
            f"disc_ch is {self.disc_ch}; it must be a positive multiple of 4, for GroupNorm",
        )
        require_sizes(self, "perceptual_crop", "disc_start", "revive_every", at_least=0)
        require_weights(self, "l2_weight", "perceptual_weight", "disc_weight")
        require(0 < self.min_scale <= 1, f"min_scale is {self.min_scale}; use (0, 1]")
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"betas is {self.betas}; use two numbers in [0, 1)",
        )
        require_choice(self, "perceptual", "efficientnet", "lpips", "none")
        require_choice(self, "disc_regularisation", "none", "r1", "lecam")
        require_choice(self, "codes", "gradient", "ema")
        require(
            not self.only_decoder or (self.init != "" and self.codes == "gradient" and not self.revive_every),
            f"only_decoder is true with init={self.init}, codes={self.codes}, revive_every={self.revive_every}; it "
            "needs init=OUT/vqgan.safetensors, codes=gradient and revive_every=0, so that codes do not change",
        )
        regularised, weight = self.disc_regularisation != "none", self.disc_regularisation_weight
        require(
            math.isfinite(weight) and (weight > 0) == regularised,
            f"disc_regularisation_weight is {weight} with disc_regularisation={self.disc_regularisation}; "
            + ("use a positive number, such as 10 for r1, 0.01 for lecam" if regularised else "use 0 with none"),
        )


@dataclass
class Stage2Config(TrainConfig):
    """Settings of stage 2: cross-entropy of the tokens given a perturbed image embedding."""

    optimizer: str = "adamw"
    """adamw, or muon for the blocks' matrices and AdamW for the rest (not with fsdp: it needs whole matrices)."""
    weight_decay: float = 0.05
    condition_dropout: float = 0.1
    """Fraction of images trained without condition, which classifier-free guidance needs."""
    noise_angle: float = 0.0
    """Largest angle, degrees, by which an embedding is rotated in a random direction (arXiv 2111.13792)."""
    neighbours: int = 0
    """Interpolate each embedding towards one of its k nearest neighbours; 0 disables."""
    token_noise: float = 0.0
    """Largest fraction of input tokens replaced by those of another image, so that the GPT relies on the condition,
    recovers from its own mistakes and does not memorise sequences (taming-transformers' `pkeep`)."""
    clip_weight: float = 0.0
    """Weight of the embedding-reconstruction loss, the paper's lambda; 0.2 there."""
    clip_every: int = 1
    """Compute the embedding loss every so many steps, weighted by that number."""
    clip_batch: int = 8
    """Images per step, over all processes, that the embedding loss is computed for."""
    parallel: str = "ddp"
    """With several processes: ddp replicates the model, fsdp shards it."""
    prompts: list[str] = field(default_factory=list)
    """Sentences to generate samples for during training, besides the held-out images."""
    views: int = 1
    """Random crops per image that are encoded, every second one flipped."""
    from_pixels: bool = False
    """Encode images in every step instead of once before training: slower, but nothing is stored."""
    min_scale: float = 1.0
    """Smallest side of a crop, as a fraction of the image's shorter side."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, "views")
        require_sizes(self, "neighbours", at_least=0)
        require(
            not (self.from_pixels and self.neighbours),
            f"neighbours is {self.neighbours}, which needs all embeddings before training; use 0 with from_pixels",
        )
        require(0 <= self.token_noise <= 1, f"token_noise is {self.token_noise}; use [0, 1]")
        require_choice(self, "optimizer", "adamw", "muon")
        require_choice(self, "parallel", "ddp", "fsdp")
        require(
            self.optimizer == "adamw" or (self.parallel == "ddp" and self.precision != "fp16"),
            f"optimizer is {self.optimizer} with parallel={self.parallel} and precision={self.precision}; it needs "
            "whole matrices, and fp16 scales for one optimizer: use parallel=ddp and precision=bf16, or adamw",
        )
        require(
            self.parallel == "ddp" or self.precision != "fp16",
            f"precision is {self.precision} with parallel={self.parallel}; use bf16 or no",
        )
        require_sizes(self, "clip_every", "clip_batch")
        require(
            not self.clip_weight or self.batch_size % self.clip_batch == 0,
            f"clip_batch is {self.clip_batch}; it must divide batch_size, {self.batch_size}",
        )
        require_weights(self, "weight_decay", "clip_weight")
        require(0 < self.min_scale <= 1, f"min_scale is {self.min_scale}; use (0, 1]")
        require(
            self.views <= 2 or self.min_scale < 1,
            f"views is {self.views} with min_scale=1; whole images have two, one of them flipped: use views=2, or a "
            "smaller min_scale",
        )
        require(0 <= self.condition_dropout < 1, f"condition_dropout is {self.condition_dropout}; use [0, 1)")
        require(0 <= self.noise_angle < 90, f"noise_angle is {self.noise_angle} degrees; use [0, 90)")


@dataclass
class Config:
    """A configuration file: the model and its two training stages."""

    model: ModelConfig = field(default_factory=ModelConfig)
    stage1: Stage1Config = field(default_factory=Stage1Config)
    stage2: Stage2Config = field(default_factory=Stage2Config)


def load_config(name: str | Path, overrides: list[str] | None = None) -> Config:
    """Read `configs/NAME.yaml` or a file and apply overrides such as `stage1.lr=1e-4`.

    Raises:
        ConfigError: there is no such configuration, or a value in it is not allowed.
    """
    path = find_config(name)
    return build(Config, read_yaml(path, overrides), str(path))
