"""Accuracy of each precision: the mini model's logits, tokens and CLIP scores against those of float32.

    python benchmarks/precision.py [--weights weights/mini] [--precisions bfloat16 float16 int8] [--json]

The float32 model generates images of prompts of `mini_quality.py`. For the same tokens, the logits of every other
precision are compared: share of positions with the same most likely token, and mean Kullback-Leibler divergence. Then
each precision generates from the same seeds, for the CLIP score of the best candidate. `mini_quality.py --dtype int8`
scores a precision with the judge.
"""

from __future__ import annotations

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from prompts import draw_prompts
from torch import Tensor

from clipgen.engine.sequence import Sequence as ImageSequence
from clipgen.pipeline import ClipGen
from clipgen.request import GenerationRequest
from clipgen.utils.entry_point import entry_point
from clipgen.weights.precision import PRECISIONS

ROOT = Path(__file__).resolve().parent.parent
EXACT = "float32"
CANDIDATES = 4
PER_KIND = 6
"""Prompts of each kind."""
WORDS = {"dog": ("puppy",), "cat": ("kitten",)}
"""Other words for objects, in place of WordNet's, which need not be installed."""


@torch.inference_mode()
def next_logits(pipe: ClipGen, conditions: Tensor, tokens: Tensor) -> Tensor:
    """Logits of every position given the tokens before it, (n, T, V) float32, by decoding steps."""
    gpt, cache = pipe.gpt, pipe.gpt.allocate(len(tokens))
    inputs = [gpt.embed_condition(conditions.to(gpt.cond_proj.weight)), *gpt.tok_emb(tokens[:, :-1]).unbind(1)]
    positions = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
    steps = [gpt.decode_step(x, positions + t, cache, t + 1) for t, x in enumerate(inputs)]
    return torch.stack(steps, dim=1).float()


def best_clip_score(pipe: ClipGen, prompts: Sequence[str]) -> tuple[float, float]:
    """Mean CLIP score of the best candidate of each prompt, and the seconds that generating took."""
    start = time.perf_counter()
    results = pipe.generate([GenerationRequest(text, 1, CANDIDATES, seed=0) for text in prompts])
    spent = time.perf_counter() - start
    return sum(result.scores[0] for result in results) / len(results), spent


def measure(weights: Path, names: Sequence[str], prompts: Sequence[str]) -> list[dict]:
    """Measure each precision; the first row is that of float32."""
    exact = ClipGen.from_pretrained(weights, device="cpu", dtype=EXACT)
    conditions = torch.stack([exact.embed(text) for text in prompts])
    sequences = [ImageSequence(condition, seed, exact.config.sampling) for seed, condition in enumerate(conditions)]
    tokens = exact.engine.generate(sequences).tokens
    expected = next_logits(exact, conditions, tokens).log_softmax(-1)
    rows = []
    for name in [EXACT, *(n for n in names if n != EXACT)]:
        pipe = exact if name == EXACT else ClipGen.from_pretrained(weights, device="cpu", dtype=name)
        found = next_logits(pipe, conditions, tokens).log_softmax(-1)
        score, seconds = best_clip_score(pipe, prompts)
        rows.append(
            {
                "precision": name,
                "same_likeliest": (found.argmax(-1) == expected.argmax(-1)).float().mean().item(),
                "divergence": (expected.exp() * (expected - found)).sum(-1).mean().item(),
                "clip_score": score,
                "seconds": seconds,
            }
        )
    return rows


def to_table(rows: list[dict]) -> str:
    """Markdown table of a report."""
    head = ["precision", "likeliest token the same", "divergence, nats", f"CLIP score, best of {CANDIDATES}", "s"]
    lines = [f"| {' | '.join(head)} |", "|---|---|---|---|---|"]
    for r in rows:
        agreement = f"{r['same_likeliest']:.2%} | {r['divergence']:.5f} | {r['clip_score']:.4f}"
        lines.append(f"| {r['precision']} | {agreement} | {r['seconds']:.1f} |")
    return "\n".join(lines)


@entry_point()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=ROOT / "weights" / "mini", help="folder of weights")
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=["bfloat16", "float16", "int8"], help="besides float32"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    prompts = [prompt.text for prompt in draw_prompts("development", PER_KIND, WORDS)]
    rows = measure(args.weights, args.precisions, prompts)
    print(json.dumps(rows) if args.json else to_table(rows))


if __name__ == "__main__":
    main()
