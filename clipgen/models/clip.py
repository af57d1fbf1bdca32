"""CLIP: embed prompts and images on one unit sphere (Radford et al. 2021, arXiv 2103.00020).

The towers are those of OpenAI's `clip` package, of any size, frozen. Shapes: B batch, L context length, D embedding,
S side of the input image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgen.errors import ConfigError, WeightsError
from clipgen.models.meta_init import meta_init

if TYPE_CHECKING:
    from clip.simple_tokenizer import SimpleTokenizer


def find_openai_clip() -> Path:
    """Return the folder of OpenAI's package `clip`.

    It is found through the installed distribution, not by importing `clip`: a clip.py or clip/ of the user in the
    working folder would be imported instead, and executed.

    Raises:
        ConfigError: it is not installed; the message names the file that has its name, if there is one.
    """
    for name in ("clip-anytorch", "clip"):
        try:
            folder = Path(str(distribution(name).locate_file("clip")))
        except PackageNotFoundError:
            continue
        if (folder / "simple_tokenizer.py").is_file():
            return folder
    spec = find_spec("clip")
    places = [spec.origin, *(spec.submodule_search_locations or [])] if spec else []  # a folder may have no origin
    shadow = next((f"; {place} has its name but is something else" for place in places if place), "")
    raise ConfigError(f"OpenAI's clip is not installed{shadow}. Run: pip install clip-anytorch")


def _load_module(name: str) -> ModuleType:
    """Load one module of OpenAI's package without the package.

    The package's `__init__` imports pkg_resources and all of torchvision, three quarters of the import time.
    """
    spec = spec_from_file_location(f"clipgen.models.openai_clip_{name}", find_openai_clip() / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


openai_model = _load_module("model")
"""OpenAI's `clip.model`."""
if TYPE_CHECKING:
    from clip.model import CLIP as OpenAIClip
else:
    OpenAIClip = openai_model.CLIP

# The longest token of the vocabulary is 32 bytes; allowing for spaces, text beyond this many characters per position
# cannot fit. BPE takes quadratic time on one endless word, so that text is not encoded at all.
_CHARACTERS_PER_TOKEN = 64


VOCAB_SIZE = 49_408
"""Tokens of OpenAI's vocabulary: 512 bytes (within a word and at its end), 48,894 merges of them, start and end."""
_MIN_VOCAB_SIZE = 514


@lru_cache(maxsize=2)
def _bpe(vocab_size: int) -> SimpleTokenizer:
    """OpenAI's byte-pair encoder, loaded once, on first use.

    A smaller vocabulary leaves out the rarest merges, which come last: rare words become more tokens.
    """
    bpe = _load_module("simple_tokenizer").SimpleTokenizer()
    if vocab_size < len(bpe.encoder):
        *common, start, end = bpe.encoder
        bpe.encoder = {token: i for i, token in enumerate([*common[: vocab_size - 2], start, end])}
        bpe.decoder = {i: token for token, i in bpe.encoder.items()}
        bpe.bpe_ranks = dict(islice(bpe.bpe_ranks.items(), vocab_size - _MIN_VOCAB_SIZE))
    return bpe


def tokenize(prompts: Sequence[str], context_length: int, vocab_size: int = VOCAB_SIZE) -> tuple[Tensor, list[str]]:
    """Encode prompts as OpenAI's CLIP does: start token, lower-case byte-pair tokens, end token, zeros.

    CLIP reads the embedding at the end-of-text token, so a prompt that is too long keeps that token and loses its
    last words. A user cannot type control tokens: "<|endoftext|>" in a prompt is dropped.

    Args:
        context_length: L, tokens of a prompt including start and end.
        vocab_size: rows of the token table, 514 to 49,408.

    Returns:
        int64 tokens (B, L), and for each prompt the text that was truncated ("" if everything fitted).

    Raises:
        WeightsError: the context has no room for start and end token.
    """
    if isinstance(prompts, str):  # a string is a sequence of strings too: its letters would become prompts
        prompts = [prompts]
    if context_length < 2:
        raise WeightsError(f"context_length is {context_length}; it must be at least 2, for the start and end tokens")
    bpe = _bpe(vocab_size)
    start, end = bpe.encoder["<|startoftext|>"], bpe.encoder["<|endoftext|>"]
    tokens = torch.zeros(len(prompts), context_length, dtype=torch.long)
    truncated = []
    for row, prompt in zip(tokens, prompts, strict=True):
        text, rest = _cut_text(prompt, context_length * _CHARACTERS_PER_TOKEN)
        ids = [token for token in bpe.encode(text) if token not in (start, end)]
        kept, tail = ids[: context_length - 2], ids[context_length - 2 :]
        row[: len(kept) + 2] = torch.tensor([start, *kept, end])
        truncated.append(" ".join(filter(None, [bpe.decode(tail).strip(), rest])))
    return tokens, truncated


def _cut_text(text: str, limit: int) -> tuple[str, str]:
    """Cut text after at most `limit` characters, between words if possible."""
    if len(text) <= limit:
        return text, ""
    text = " ".join(text.split())
    cut = text.rfind(" ", limit // 2, limit)
    cut = limit if cut < 0 else cut
    return text[:cut], text[cut:].strip()


class Clip(nn.Module):
    """The frozen text and image towers; built by `Clip.from_state_dict`.

    Attributes:
        image_size: S, side of the input image in pixels.
        embed_dim: D.
        context_length: L, tokens of a prompt including start and end.
    """

    def __init__(self, model: OpenAIClip) -> None:
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
        """Build the towers from the weights alone; every size is read from their shapes.

        Args:
            state_dict: OpenAI's names (ViT or ResNet), in any precision; it is copied, not changed.
            dtype: precision of the matrix products; LayerNorm and BatchNorm stay in float32.

        Raises:
            WeightsError: missing, unexpected or wrongly shaped weights, or a larger vocabulary than OpenAI's.
        """
        # `build_model` reads the sizes and checks names and shapes, but it also initialises random weights and rounds
        # to float16. On the meta device only the reading and the checks are left.
        try:
            with meta_init():
                model = openai_model.build_model(
                    {name: torch.empty_like(t, device="meta") for name, t in state_dict.items()}
                )
        except (LookupError, AssertionError, ArithmeticError, RuntimeError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise WeightsError(
                f"not the weights of an OpenAI CLIP ({reason}); check that the file is complete"
            ) from error
        if not _MIN_VOCAB_SIZE <= model.vocab_size <= VOCAB_SIZE:
            raise WeightsError(
                f"token_embedding has {model.vocab_size} rows; OpenAI's tokens need {_MIN_VOCAB_SIZE} to {VOCAB_SIZE}"
            )
        model.to(dtype)
        for module in model.modules():
            if isinstance(module, (openai_model.LayerNorm, nn.BatchNorm2d)):
                module.float()
        placed = {name: state_dict[name].to(device, like.dtype, copy=True) for name, like in model.state_dict().items()}
        model.load_state_dict(placed, assign=True)
        mask = torch.full((model.context_length, model.context_length), float("-inf"), device=device).triu(1)
        for block in model.transformer.resblocks:  # not a buffer, so still on the meta device
            block.attn_mask = mask
        return cls(model)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.model.text_projection.device

    def train(self, mode: bool = True) -> Clip:
        """Do nothing: the towers are frozen and stay in eval mode inside a model that is trained."""
        return self

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, list[str]]:
        """`tokenize` for this model: tokens (B, L), and the text of each prompt beyond its context."""
        return tokenize(prompts, self.context_length, self.model.vocab_size)

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Embed prompts, float32 (B, D), unit norm; text beyond the context is ignored (`tokenize` returns it)."""
        tokens, _ = self.tokenize(prompts)
        if not len(tokens):
            return torch.empty(0, self.embed_dim, device=self.device)
        # The mask is causal and the embedding is read at the end token, so positions after the longest prompt have no
        # effect and are left out.
        length = int(tokens.argmax(dim=1).max()) + 1  # the end token has the highest id
        return F.normalize(self.model.encode_text(tokens[:, :length].to(self.device)).float(), dim=-1)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Embed images, float32 (B, D), unit norm; differentiable with respect to the pixels.

        Args:
            pixels: (B, 3, S, S), CLIP-normalised (`to_clip`, `clip_from_pixels` of `images.pixels`), on any device.

        Raises:
            WeightsError: another shape.
        """
        expected = (3, self.image_size, self.image_size)
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != expected:
            raise WeightsError(
                f"pixels have the shape {tuple(pixels.shape)}; it must be (B, {', '.join(map(str, expected))})"
            )
        return F.normalize(self.model.encode_image(pixels.to(self.device)).float(), dim=-1)
