"""Decoding time by number of tokens: linear with a KV cache, quadratic without.

    python benchmarks/scaling.py [--tokens 64 128 256 512 1024] [--layers 6] [--rows 1] [--plot FILE.png] [--json]

Both loops run in float32, at the width of GPT2-medium with fewer layers; the cached one with prepacked weights, as when
serving. The uncached loop is timed for up to --whole tokens. The exponent is that of the growth between the two largest
numbers of tokens: 1 is linear, 2 quadratic.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]  # run from anywhere, installed or not

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

import torch  # noqa: E402
from plot import plot  # noqa: E402
from roofline import describe, in_words, random_weights  # noqa: E402

from clipgen.config import GPTConfig  # noqa: E402
from clipgen.models.gpt import GPT, KVCache  # noqa: E402
from clipgen.utils.entry_point import entry_point  # noqa: E402
from train.config import load_config  # noqa: E402
from train.loop.arguments import at_least  # noqa: E402

Series = dict[str, list[tuple[int, float]]]


@torch.inference_mode()
def cached(gpt: GPT, rows: int) -> float:
    """Seconds of all decoding steps of `rows` images. Sampling is greedy, whose cost is negligible."""
    cache = KVCache.allocate(gpt.config, rows)
    start = time.perf_counter()
    x = gpt.embed_condition(torch.zeros(rows, gpt.config.n_cond))
    for position in range(gpt.config.block_size):
        x = gpt.tok_emb(gpt.decode_step(x, torch.full((rows,), position), cache, position + 1).argmax(-1))
    return time.perf_counter() - start


@torch.inference_mode()
def uncached(gpt: GPT, rows: int) -> float:
    """Seconds of the same tokens, each by a full forward pass over those before it."""
    tokens = torch.empty(rows, 0, dtype=torch.long)
    start = time.perf_counter()
    for _ in range(gpt.config.block_size):
        token = gpt(tokens, torch.zeros(rows, gpt.config.n_cond))[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, token], dim=1)
    return time.perf_counter() - start


def measure(config: GPTConfig, lengths: Sequence[int], rows: int, whole: int) -> Series:
    """Seconds of both loops for each number of tokens.

    Args:
        lengths: numbers of tokens.
        rows: images decoded at once.
        whole: largest number of tokens for the uncached loop.
    """
    series: Series = {"cached": [], "uncached": []}
    for length in sorted(lengths):
        with torch.device("meta"):
            empty = GPT(replace(config, block_size=length))
        gpt: Any = random_weights(empty)
        if length <= whole:
            series["uncached"].append((length, uncached(gpt, rows)))
        series["cached"].append((length, cached(gpt.prepack(), rows)))
        for name, points in series.items():
            if points and points[-1][0] == length:
                print(f"  {name}, {length} tokens: {points[-1][1]:.2f} s", file=sys.stderr, flush=True)
    return series


def exponent(points: list[tuple[int, float]]) -> float | None:
    """Exponent of the growth between the last two points: 1 is linear, 2 quadratic; None with fewer than two."""
    if len(points) < 2:
        return None
    (n, a), (m, b) = points[-2:]
    return math.log(b / a) / math.log(m / n)


def to_table(report: dict) -> str:
    """Markdown table of a report."""
    seconds = {name: dict(points) for name, points in report["series"].items()}
    lines = [in_words(report["machine"]), "", "| tokens | cached, s | uncached, s |", "|---|---|---|"]
    for tokens in seconds["cached"]:
        slow = seconds["uncached"].get(tokens)
        lines.append(f"| {tokens} | {seconds['cached'][tokens]:.2f} | {'' if slow is None else f'{slow:.2f}'} |")
    found = [f"{name} {value:.2f}" for name, value in report["exponents"].items() if value is not None]
    return "\n".join([*lines, "", f"Exponents of the last step: {', '.join(found) or 'need two lengths'}."])


@entry_point()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=at_least(1), nargs="+", default=[64, 128, 256, 512, 1024], help="of an image")
    parser.add_argument("--layers", type=at_least(1), default=6, help="layers of the GPT")
    parser.add_argument("--rows", type=at_least(1), default=1, help="images at once")
    parser.add_argument("--whole", type=at_least(0), default=512, help="largest number of tokens of the uncached loop")
    parser.add_argument("--plot", type=Path, help="PNG file for a plot")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    config = replace(load_config("coco").model.gpt, n_layer=args.layers)
    machine = describe()
    series = measure(config, args.tokens, args.rows, args.whole)
    exponents = {name: exponent(points) for name, points in series.items()}
    report = {"machine": machine, "rows": args.rows, "layers": args.layers, "series": series, "exponents": exponents}
    if args.plot:
        plot(series, "seconds against tokens, both logarithmic", args.plot, logarithmic=True)
    print(json.dumps(report) if args.json else to_table(report))


if __name__ == "__main__":
    main()
