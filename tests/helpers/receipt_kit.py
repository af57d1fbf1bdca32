"""A receipt to vary in tests."""

from __future__ import annotations

from clipgen.outputs.metadata import PromptPart, Receipt

RECEIPT = Receipt(
    prompt=(PromptPart(1.0, "a lemon"),),
    seed=7,
    image_seed=9,
    index=0,
    num_outputs=2,
    candidates=3,
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
    software="0",
)
