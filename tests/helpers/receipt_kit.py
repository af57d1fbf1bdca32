"""Receipts to vary in tests."""

from __future__ import annotations

import json
from typing import Any

from clipgen import __version__
from clipgen.outputs.metadata import KEY, PromptPart, Receipt

RECEIPT = Receipt(
    prompt=(PromptPart(1.0, "a lemon"),),
    seed=7,
    image_seed=9,
    index=0,
    num_outputs=2,
    candidates=4,
    guidance=1.5,
    temperature=0.8,
    top_k=9,
    top_p=0.5,
    keep="",
    keep_rows=0,
    score=0.5,
    model="tiny",
    weights="0" * 64,
    dtype="float32",
    device="cpu",
    torch="2",
    software=__version__,
)


def as_json(**changes: Any) -> dict[str, Any]:
    """`RECEIPT` as the JSON object that is written into files, with changes."""
    return json.loads(RECEIPT.to_metadata()[KEY]) | changes


def parse(value: Any) -> Receipt:
    """Parse a receipt from JSON text, or from an object that is written as JSON first."""
    return Receipt.from_metadata({KEY: value if isinstance(value, str) else json.dumps(value)})
