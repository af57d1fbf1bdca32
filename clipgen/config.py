"""Typed configurations: what a model is and how it samples.

Every section is a dataclass that OmegaConf checks for names and types and that checks its own values when it is
built, so a bad configuration fails before any tensor is created.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from clipgen.errors import ConfigError
from clipgen.request import SamplingParams
from clipgen.utils.text import first_line

CONFIGS = Path(__file__).parent / "configs"
MAX_DEPTH = 1024
"""Layers of a network."""
MAX_NAME = 100
"""Characters of a model's name, which every receipt holds."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_sizes(config: object, *names: str, at_least: int = 1, section: str = "") -> None:
    """Refuse whole numbers below `at_least`."""
    for name in names:
        value = getattr(config, name)
        require(value >= at_least, f"{section}{name} is {value}; it must be at least {at_least}")


def require_depth(config: object, name: str, section: str) -> None:
    """Refuse more layers than any model has: building them would take hours before their weights are compared."""
    value = getattr(config, name)
    require(value <= MAX_DEPTH, f"{section}{name} is {value}; it must be at most {MAX_DEPTH}")


def require_weights(config: object, *names: str, section: str = "") -> None:
    """Refuse numbers that are negative or not finite."""
    for name in names:
        value = getattr(config, name)
        require(math.isfinite(value) and value >= 0, f"{section}{name} is {value}; it must be 0 or a positive number")


def require_choice(config: object, name: str, *allowed: str) -> None:
    """Refuse values other than the allowed words."""
    value = getattr(config, name)
    require(value in allowed, f"{name} is {value!r}; use {', '.join(allowed[:-1])} or {allowed[-1]}")


@dataclass
class VQGANConfig:
    """Encoder, quantizer and decoder (Esser et al., arXiv 2012.09841)."""

    image_size: int = 256
    patch: int = 1
    """Pixels folded into channels at the image end (pixel unshuffle); 1 is the original architecture."""
    ch: int = 128
    ch_mult: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    num_res_blocks: int = 2
    attn_resolutions: list[int] = field(default_factory=lambda: [16])
    z_channels: int = 256
    embed_dim: int = 256
    codebook_size: int = 16384
    l2_codes: bool = False
    """Compare unit-norm latents with unit-norm codes (Yu et al., arXiv 2110.04627): no code is left unused."""
    beta: float = 0.25
    """Weight of the term that moves the codes; 1 is the weight of the term that moves the encoder."""
    norm: str = "group"
    """group: GroupNorm before every convolution, as published; none: without, several times as fast on a CPU."""
    norm_eps: float = 1e-6
    local_encoder: bool = False
    """The encoder sees each patch alone (1 x 1 convolutions, no attention), the decoder all of them: what moves by
    whole patches keeps its tokens."""

    def __post_init__(self) -> None:
        sizes = ("image_size", "patch", "ch", "num_res_blocks", "z_channels", "embed_dim")
        require_sizes(self, *sizes, section="vqgan.")
        require_sizes(self, "codebook_size", at_least=2, section="vqgan.")
        require_depth(self, "num_res_blocks", "vqgan.")
        require_weights(self, "beta", section="vqgan.")
        require(0 < self.norm_eps < 1, f"vqgan.norm_eps is {self.norm_eps}; it must be between 0 and 1")
        levels = len(self.ch_mult)
        require(1 <= levels <= 16, f"vqgan.ch_mult has {levels} multipliers; give 1 to 16, one for each resolution")
        require(min(self.ch_mult) >= 1, f"vqgan.ch_mult is {self.ch_mult}; every multiplier must be at least 1")
        require_choice(self, "norm", "group", "none")
        alone = self.norm == "none" and levels == 1 and not self.attn_resolutions
        require(
            alone or not self.local_encoder,
            "vqgan.local_encoder needs ch_mult=[1], attn_resolutions=[] and norm=none: else patches see each other",
        )
        require(self.norm == "none" or self.ch % 32 == 0, f"vqgan.ch is {self.ch}; GroupNorm needs a multiple of 32")
        require(
            self.image_size % self.downsampling == 0,
            f"vqgan.image_size {self.image_size} is no multiple of patch x 2^(levels - 1) = {self.downsampling}",
        )

    @property
    def downsampling(self) -> int:
        """Pixels per token along one side."""
        return self.patch * 2 ** (len(self.ch_mult) - 1)

    @property
    def grid(self) -> int:
        """Tokens along one side of the image."""
        return self.image_size // self.downsampling

    @property
    def num_tokens(self) -> int:
        """Tokens of one image, T."""
        return self.grid**2


@dataclass
class GPTConfig:
    """The pre-norm transformer that writes the tokens (Wang et al., arXiv 2203.00386)."""

    n_layer: int = 24
    n_head: int = 16
    n_embd: int = 1024
    vocab_size: int = 16384
    block_size: int = 256
    """Positions: the condition, then all tokens but the last one."""
    n_cond: int = 512
    """Size of the condition: that of the CLIP embedding, D."""
    dropout: float = 0.0
    qk_norm: bool = False
    """Normalise queries and keys (Henry et al., arXiv 2010.04245), with a gain for each channel; off as published."""

    def __post_init__(self) -> None:
        sizes = ("n_layer", "n_head", "n_embd", "vocab_size", "block_size", "n_cond")
        require_sizes(self, *sizes, section="gpt.")
        require_depth(self, "n_layer", "gpt.")
        require(self.n_embd % self.n_head == 0, f"gpt.n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        require(0 <= self.dropout < 1, f"gpt.dropout is {self.dropout}; it must be in [0, 1)")


@dataclass
class ModelConfig:
    """Everything that `clipgen` needs to know about a folder of weights."""

    name: str = "coco"
    vqgan: VQGANConfig = field(default_factory=VQGANConfig)
    gpt: GPTConfig = field(default_factory=GPTConfig)
    sampling: SamplingParams = field(default_factory=SamplingParams)

    def __post_init__(self) -> None:
        require(len(self.name) <= MAX_NAME, f"name has {len(self.name)} characters; it must have at most {MAX_NAME}")
        require(
            self.gpt.vocab_size == self.vqgan.codebook_size,
            f"gpt.vocab_size {self.gpt.vocab_size} differs from vqgan.codebook_size {self.vqgan.codebook_size}",
        )
        require(
            self.gpt.block_size == self.vqgan.num_tokens,
            f"gpt.block_size {self.gpt.block_size} differs from the image's {self.vqgan.num_tokens} tokens",
        )


def build(kind: type, values: Any, origin: str) -> Any:
    """Merge `values` (a dict or an OmegaConf node) into the dataclass `kind` and validate it.

    Raises:
        ConfigError: an unknown name, a wrong type or a value that cannot work; the message starts with `origin`.
    """
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values))
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        field = getattr(error, "full_key", None)  # OmegaConf's errors know which value they are about
        where = f"{origin}: {field}" if field else origin
        raise ConfigError(f"{where}: {first_line(error)}") from error


def find_config(name: str | Path) -> Path:
    """The file of a configuration: `configs/NAME.yaml`, or a path that ends in .yaml.

    Raises:
        ConfigError: there is no such file.
    """
    path = Path(name) if Path(name).suffix in (".yaml", ".yml") else CONFIGS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.yaml")))
        raise ConfigError(f"no configuration {str(name)!r}; use one of {known}, or the path of a .yaml file")
    return path


def load_preset(name: str | Path) -> ModelConfig:
    """Read the model section of `configs/NAME.yaml` or of another .yaml file.

    Raises:
        ConfigError: no such configuration, no such section in it, or a value in it is wrong.
    """
    path = find_config(name)
    values = read_yaml(path)
    if "model" not in values:
        raise ConfigError(f"{path}: there is no section `model:`; see {CONFIGS / 'mini.yaml'}")
    return build(ModelConfig, values["model"], str(path))


def load_model_config(path: Path) -> ModelConfig:
    """Read the model section that lies beside weights.

    Raises:
        ConfigError: the file is missing or a value in it is wrong.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is missing; a folder of weights holds a config.yaml")
    values = read_yaml(path)
    # ${oc.env:HF_TOKEN} in a stranger's file would put the user's secrets into names, receipts and logs.
    if "${" in json.dumps(OmegaConf.to_container(values, resolve=False), default=str):
        raise ConfigError(f"{path} holds ${{...}}; a folder of weights must state its values")
    values.pop("prior", None)  # of earlier versions, which moved a sentence's embedding to those of training images
    gpt = values.get("gpt")
    if OmegaConf.is_dict(gpt) and gpt.pop("n_things", 1) != 1:
        raise ConfigError(
            f"{path}: gpt.n_things is not 1: these weights are of an earlier version, whose GPT saw several "
            "embeddings; use today's weights, or the clipgen that they came with"
        )
    return build(ModelConfig, values, str(path))


def read_yaml(path: Path, overrides: list[str] | None = None) -> Any:
    """Read a YAML file and apply overrides such as `stage1.lr=1e-4`.

    Raises:
        ConfigError: it cannot be read, or is not a mapping of names to values.
    """
    try:
        values = OmegaConf.load(path)
        require(OmegaConf.is_dict(values), "is not a mapping of names to values, such as `name: mini`")
        return OmegaConf.merge(values, OmegaConf.from_dotlist(overrides or []))
    except (OmegaConfBaseException, YAMLError, OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: {first_line(error)}") from error
