"""How the two stages train: the settings of each, which check their own values."""

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
    """What both stages share."""

    steps: int = 100_000
    batch_size: int = 64
    """Images per step over all processes."""
    accumulate: int = 1
    """Parts that each process takes its share of a batch in, one after the other: the same step in less memory."""
    recompute: bool = False
    """Compute activations again where the backward pass needs them, not keep them (gradient checkpointing)."""
    held_out: int = 512
    """Pictures, at most a twentieth of all, that are never trained on but measured; with 0 trained ones are."""
    init: str = ""
    """Weights to start from, a .safetensors file of the same model; empty starts from scratch."""
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
    """Checkpoints that stay, the newest."""
    patience: int = 10
    """Log lines in a row that show the same trouble (train/loop/health.py) before training stops; 0 only says so."""

    def __post_init__(self) -> None:
        require_sizes(self, "steps", "batch_size", "accumulate", "log_every", "sample_every", "save_every", "keep")
        require_sizes(self, "warmup", "seed", "workers", "held_out", "patience", at_least=0)
        for name in ("lr", "grad_clip"):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, f"{name} is {value}; it must be positive")
        require(0 <= self.ema < 1, f"ema is {self.ema}; use [0, 1)")
        require_choice(self, "precision", "no", "bf16", "fp16")


@dataclass
class Stage1Config(TrainConfig):
    """Losses of the VQGAN: L1 + perceptual + codebook, then a hinge GAN with an adaptive weight."""

    betas: list[float] = field(default_factory=lambda: [0.5, 0.9])
    """Adam's, of the generator; the discriminator keeps the paper's (0.5, 0.9)."""
    min_scale: float = 0.8
    """Smallest part of the picture that a random crop keeps, along its side."""
    l2_weight: float = 0.0
    perceptual: str = "efficientnet"
    perceptual_weight: float = 1.0
    perceptual_crop: int = 0
    """Side of the random crop whose features are compared, px; 0 compares whole pictures."""
    disc_start: int = 50_000
    disc_weight: float = 0.8
    disc_ch: int = 64
    disc_lr: float = 1e-4
    disc_regularisation: str = "none"
    """none, r1 (arXiv 1801.04406) or lecam (arXiv 2104.03310): keeps the discriminator from winning on few pictures."""
    disc_regularisation_weight: float = 0.0
    """Such as 10 for r1, 0.01 for lecam."""
    codes: str = "gradient"
    """How codes learn: gradient, or ema, each the moving average of the latents that chose it (arXiv 1711.00937)."""
    revive_every: int = 200
    """Codes that no latent chose in so many steps move to where latents are; 0 never."""
    only_decoder: bool = False
    """Train on from `init` without changing a token, for a GPT that has learned them: encoder and codes stay."""

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
            f"only_decoder is true with init={self.init}, codes={self.codes}, revive_every={self.revive_every}; codes "
            "stay with init=OUT/vqgan.safetensors, codes=gradient and revive_every=0",
        )
        regularised, weight = self.disc_regularisation != "none", self.disc_regularisation_weight
        require(
            math.isfinite(weight) and (weight > 0) == regularised,
            f"disc_regularisation_weight is {weight} with disc_regularisation={self.disc_regularisation}; "
            + ("use a positive number, such as 10 for r1, 0.01 for lecam" if regularised else "use 0 without one"),
        )


@dataclass
class Stage2Config(TrainConfig):
    """Loss of the GPT: cross-entropy of the tokens given a perturbed image embedding."""

    optimizer: str = "adamw"
    """adamw, or muon for the blocks' matrices and AdamW for the rest (one device or DDP: it needs whole matrices)."""
    weight_decay: float = 0.05
    condition_dropout: float = 0.1
    """Share of the pictures whose condition is left out, so that guidance works."""
    noise_angle: float = 0.0
    """Largest angle, degrees, by which the embedding is turned in a random direction (arXiv 2111.13792)."""
    neighbours: int = 0
    """Each embedding is mixed with one of so many nearest ones: a sentence lies between the pictures it fits."""
    token_noise: float = 0.0
    """Largest share of the tokens a picture is continued from that are another picture's, so that the GPT goes by the
    condition and forgives its own mistakes, and does not recite what it knows by heart (taming's `pkeep`)."""
    clip_weight: float = 0.0
    """Of the distance between what CLIP sees in the predicted tokens and the condition; 0.2 in the paper (lambda)."""
    clip_every: int = 1
    """Steps from one such look to the next; each then counts as often as it stands for steps."""
    clip_batch: int = 8
    """Pictures of a step that are looked at, over all processes."""
    parallel: str = "ddp"
    """With several processes: ddp, each has the whole model, or fsdp, each has a part of it."""
    prompts: list[str] = field(default_factory=list)
    """Sentences to draw on the way, beside the pictures held out."""
    views: int = 1
    """Crops per image that are turned into tokens."""
    from_pixels: bool = False
    """Turn pictures into tokens in every step again, in place of once before training: slower, but nothing to store."""
    min_scale: float = 1.0
    """Smallest part of the picture that a crop keeps, along its side."""

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
        require(0 <= self.condition_dropout < 1, f"condition_dropout is {self.condition_dropout}; use [0, 1)")
        require(0 <= self.noise_angle < 90, f"noise_angle is {self.noise_angle} degrees; use [0, 90)")


@dataclass
class Config:
    """A configuration file: the model, and how its two stages are trained."""

    model: ModelConfig = field(default_factory=ModelConfig)
    stage1: Stage1Config = field(default_factory=Stage1Config)
    stage2: Stage2Config = field(default_factory=Stage2Config)


def load_config(name: str | Path, overrides: list[str] | None = None) -> Config:
    """Read `configs/NAME.yaml` or a file, then apply overrides such as `stage1.lr=1e-4`.

    Raises:
        ConfigError: no such configuration, or a value in it is wrong.
    """
    path = find_config(name)
    return build(Config, read_yaml(path, overrides), str(path))
