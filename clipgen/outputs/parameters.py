"""The `parameters` text that Stable Diffusion web UIs write into their images, and that other tools read.

Prompt, a line "Negative prompt: ...", and a line of "Name: value" pairs (AUTOMATIC1111/stable-diffusion-webui,
modules/infotext_utils.py). It is for people and their tools; `Receipt` is what clipgen itself reads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipgen.outputs.metadata import PromptPart, Receipt

MAX_TEXT = 1_000
"""Characters of prompt and negative prompt each."""


def parameters_text(receipt: Receipt) -> str:
    """A receipt in the web UIs' form. Images among the prompt's parts are named in brackets."""
    values = {
        **({"Steps": receipt.steps} if receipt.steps else {}),
        "Sampler": "clipgen",
        "CFG scale": f"{receipt.guidance:g}",
        "Seed": receipt.image_seed,
        **({"Size": f"{receipt.size}x{receipt.size}"} if receipt.size else {}),
        "Model hash": receipt.weights[:10],
        "Model": receipt.model,
        "Temperature": f"{receipt.temperature:g}",
        "Top-k": receipt.top_k,
        "Top-p": f"{receipt.top_p:g}",
        "Candidates": receipt.candidates,
        "Version": f"clipgen {receipt.software}",
    }
    lines = [_prompt(receipt.prompt)]
    if receipt.negative:
        lines.append(f"Negative prompt: {_prompt(receipt.negative)}")
    lines.append(", ".join(f"{name}: {_quote(str(value))}" for name, value in values.items()))
    return "\n".join(lines)


def _prompt(parts: Sequence[PromptPart]) -> str:
    """Parts on one line, weighted as the web UIs write it: (a dog:0.5)."""
    texts = [" ".join(part.text.split()) or f"[{part.name or 'image'}]" for part in parts]
    shown = [text if part.weight == 1 else f"({text}:{part.weight:g})" for text, part in zip(texts, parts, strict=True)]
    return ", ".join(shown)[:MAX_TEXT]


def _quote(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(char in value for char in ',:"\n') else value
