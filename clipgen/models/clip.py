"""CLIP: a sentence or a picture becomes a point on the unit sphere (Radford et al. 2021, arXiv 2103.00020).

The towers are those of OpenAI's `clip` package, of any size, frozen. Shapes: B batch, L context length, D embedding,
S side of the input image.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgen.errors import WeightsError
from clipgen.models.meta_init import meta_init

if TYPE_CHECKING:
    from clip.model import CLIP
    from clip.simple_tokenizer import SimpleTokenizer


def _module(name: str) -> ModuleType:
    """A module of OpenAI's package without the package itself, which imports all of torchvision and with it a compiler:
    three quarters of the time that importing took."""
    full = f"clip.{name}"
    if full not in sys.modules:
        package = find_spec("clip")
        if package is None or package.origin is None:
            raise ImportError("OpenAI's clip is missing; install requirements.txt")
        spec = spec_from_file_location(full, Path(package.origin).with_name(f"{name}.py"))
        assert spec is not None and spec.loader is not None
        sys.modules[full] = module = module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[full]


_openai = _module("model")

# Entries of OpenAI's released checkpoints that are sizes, not weights.
_SIZE_KEYS = ("input_resolution", "context_length", "vocab_size")

# The longest entry of the vocabulary stands for 32 bytes; with room for spaces, text beyond this many characters per
# position cannot fit. BPE takes quadratic time on one endless word, so what cannot fit is not encoded.
_CHARACTERS_PER_TOKEN = 64


@lru_cache(maxsize=1)
def _bpe() -> SimpleTokenizer:
    """OpenAI's byte-pair encoder, read once, on first use."""
    return _module("simple_tokenizer").SimpleTokenizer()


def tokenize(prompts: Sequence[str], context_length: int) -> tuple[Tensor, list[str]]:
    """Encode prompts as OpenAI's CLIP does: start, byte-pair tokens in lower case, end, zeros.

    The embedding is read at the end-of-text token, so a prompt that is too long keeps it and loses its last words
    instead. Nothing that a user types becomes a control token: "<|endoftext|>" in a prompt is dropped.

    Args:
        prompts: any text, one string or several.
        context_length: L, at least 2.

    Returns:
        int64 tokens (B, L), and for each prompt the text that did not fit, "" where everything did.
    """
    if isinstance(prompts, str):  # a string is a sequence of strings too: its letters would become prompts
        prompts = [prompts]
    if context_length < 2:
        raise WeightsError(f"context_length is {context_length}; it must be at least 2, for the start and end tokens")
    start, end = _bpe().encoder["<|startoftext|>"], _bpe().encoder["<|endoftext|>"]
    tokens = torch.zeros(len(prompts), context_length, dtype=torch.long)
    dropped = []
    for row, prompt in zip(tokens, prompts, strict=True):
        text, rest = _split(prompt, context_length * _CHARACTERS_PER_TOKEN)
        ids = [token for token in _bpe().encode(text) if token not in (start, end)]
        kept, tail = ids[: context_length - 2], ids[context_length - 2 :]
        row[: len(kept) + 2] = torch.tensor([start, *kept, end])
        dropped.append(" ".join(filter(None, [_bpe().decode(tail).strip(), rest])))
    return tokens, dropped


def _split(text: str, limit: int) -> tuple[str, str]:
    """Cut text that is longer than `limit` characters, between words where there are any."""
    if len(text) <= limit:
        return text, ""
    text = " ".join(text.split())
    cut = text.rfind(" ", limit // 2, limit)
    cut = limit if cut < 0 else cut
    return text[:cut], text[cut:].strip()


class Clip(nn.Module):
    """The frozen text and image towers. Make one with `Clip.from_state_dict`.

    Attributes:
        image_size: S, side of the input image in pixels.
        embed_dim: D.
        context_length: L, tokens of a prompt with its start and end.
    """

    def __init__(self, model: CLIP) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.training = False
        self.image_size: int = model.visual.input_resolution
        self.embed_dim: int = model.text_projection.shape[1]
        self.context_length: int = model.context_length

    @classmethod
    def from_state_dict(
        cls, state_dict: Mapping[str, Tensor], device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Clip:
        """Build the towers from the weights alone: every size is read from their shapes.

        Args:
            state_dict: names of OpenAI's checkpoints (ViT or ResNet), of any precision; it is copied, not changed.
            device: where to run.
            dtype: precision of the products; LayerNorm and BatchNorm stay in float32.

        Raises:
            WeightsError: missing, unexpected or wrongly shaped weights, or a vocabulary that is not OpenAI's.
        """
        weights = {name: tensor for name, tensor in state_dict.items() if name not in _SIZE_KEYS}
        # `build_model` reads the sizes and checks names and shapes, but rounds what it loads to float16, and first
        # draws random weights. In a skeleton it does the former and there is nothing to round or to draw.
        try:
            with meta_init():
                model = _openai.build_model({name: torch.empty_like(t, device="meta") for name, t in weights.items()})
        except (LookupError, AssertionError, ArithmeticError, RuntimeError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise WeightsError(
                f"not the weights of an OpenAI CLIP ({reason}); check that the file is complete"
            ) from error
        if model.vocab_size != len(_bpe().encoder):
            raise WeightsError(
                f"token_embedding has {model.vocab_size} rows; OpenAI's tokens need {len(_bpe().encoder)}"
            )
        model.to(dtype)
        for module in model.modules():
            if isinstance(module, (_openai.LayerNorm, nn.BatchNorm2d)):
                module.float()
        placed = {name: weights[name].to(device, like.dtype, copy=True) for name, like in model.state_dict().items()}
        model.load_state_dict(placed, assign=True)
        mask = torch.full((model.context_length, model.context_length), float("-inf"), device=device).triu(1)
        for block in model.transformer.resblocks:  # not a buffer, so still on the meta device
            block.attn_mask = mask
        return cls(model)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.text_projection.device

    def train(self, mode: bool = True) -> Clip:
        """Do nothing: the towers are frozen, and stay in eval mode inside a model that trains."""
        return self

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Embed prompts; text beyond the context length is dropped (`tokenize` tells what).

        Returns:
            float32 (B, D), unit norm.
        """
        tokens, _ = tokenize(prompts, self.context_length)
        if not len(tokens):
            return torch.empty(0, self.embed_dim, device=self.device)
        # The mask is causal and the embedding is read at the end token: what is after the longest prompt is never seen.
        longest = int(tokens.argmax(dim=1).max()) + 1  # the end token has the highest id
        return F.normalize(self.model.encode_text(tokens[:, :longest].to(self.device)).float(), dim=-1)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Embed images; differentiable with respect to the pixels.

        Args:
            pixels: (B, 3, S, S), CLIP-normalised (`images.to_clip`, `images.clip_from_pixels`), on any device.

        Returns:
            float32 (B, D), unit norm.

        Raises:
            WeightsError: a wrong shape.
        """
        expected = (3, self.image_size, self.image_size)
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != expected:
            raise WeightsError(
                f"pixels have the shape {tuple(pixels.shape)}; it must be (B, {', '.join(map(str, expected))})"
            )
        return F.normalize(self.model.encode_image(pixels.to(self.device)).float(), dim=-1)
