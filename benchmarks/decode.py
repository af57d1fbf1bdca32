"""Decoding time of image tokens at full size: ours and the alternatives.

    python benchmarks/decode.py [--short | --full] [--rows 1 8 32] [--tokens 256] [--repeats 3] [--json]

GPT2-medium's sizes with random weights, sampling as the published demo does (top_k 500, top_p 0.95), on the CPU. All
run in this process, in turns, so that other load on the machine affects them equally; medians are shown. --short: 32
tokens of 1 and 8 images, once. --full: 64 images too.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]  # run from anywhere, installed or not

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

import torch  # noqa: E402
from roofline import describe, floor_seconds, in_words, random_weights, read_bandwidth  # noqa: E402

from clipgen.config import GPTConfig  # noqa: E402
from clipgen.models.capabilities import cpu_dtypes, has_bfloat16  # noqa: E402
from clipgen.models.gpt import GPT  # noqa: E402
from clipgen.request import SamplingParams  # noqa: E402
from clipgen.utils.entry_point import entry_point  # noqa: E402
from train.config import load_config  # noqa: E402
from train.loop.arguments import at_least  # noqa: E402
from train.loop.samples import generate_tokens  # noqa: E402

SAMPLING = SamplingParams(temperature=1.0, top_k=500, top_p=0.95)
UNCACHED_ROWS = 8
"""The published demo's batches; the uncached loop is timed with no more, and time per image does not fall beyond."""
COMPUTE = torch.bfloat16 if has_bfloat16() else torch.float32
"""What activations and the cache have, and all of transformers' model: the faster of the two on this CPU."""
COMPUTE_NAME = str(COMPUTE).removeprefix("torch.")
DEFAULT = f"ours, {cpu_dtypes()[0]}"
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
SAMPLES = 4
"""Lengths at which the uncached loop is timed."""

Contender = Callable[[int], float]


def ours(gpt: GPT) -> Contender:
    """Seconds of our cached loop, as a function of the rows."""

    def run(rows: int) -> float:
        embedding = torch.nn.functional.normalize(torch.randn(rows, gpt.config.n_cond), dim=-1)
        if gpt.row_counts is not None:
            gpt.row_counts.at_least(rows)  # found once per process, in the time of a few steps
        start = time.perf_counter()
        generate_tokens(gpt, embedding, list(range(rows)), SAMPLING)
        return time.perf_counter() - start

    return run


def uncached(gpt: GPT) -> Contender:
    """Seconds of a loop that computes the whole sequence for every token, in float32.

    Timed once at each of SAMPLES evenly spread lengths and multiplied by the number of tokens, because the time of a
    token grows almost linearly with the length of the sequence.
    """

    @torch.inference_mode()
    def run(rows: int) -> float:
        batch = min(rows, UNCACHED_ROWS)
        embedding, total = torch.randn(batch, gpt.config.n_cond), gpt.config.block_size
        spent = 0.0
        for i in range(SAMPLES):
            tokens = torch.randint(0, gpt.config.vocab_size, (batch, int(total * (i + 0.5) / SAMPLES)))
            start = time.perf_counter()
            gpt(tokens, embedding)
            spent += time.perf_counter() - start
        return spent / SAMPLES * total * rows / batch

    return run


def transformers_generate(config: GPTConfig, cache: str) -> Contender:
    """Hugging Face's generate() with a GPT-2 of the same sizes in COMPUTE, from one start token."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.block_size + 1,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.device("meta"):
        model = GPT2LMHeadModel(settings).to(COMPUTE)
    model = random_weights(model)
    model.tie_weights()

    @torch.inference_mode()
    def run(rows: int) -> float:
        start_tokens = torch.ones(rows, 1, dtype=torch.long)
        start = time.perf_counter()
        found = model.generate(
            start_tokens,
            attention_mask=torch.ones_like(start_tokens),
            max_new_tokens=config.block_size,
            min_new_tokens=config.block_size,
            do_sample=True,
            top_k=SAMPLING.top_k,
            top_p=SAMPLING.top_p,
            cache_implementation=cache,
        )
        spent = time.perf_counter() - start
        assert found.shape == (rows, config.block_size + 1), found.shape
        return spent

    return run


def contenders(config: GPTConfig, names: Sequence[str]) -> dict[str, Contender]:
    """The decoders in `names`, with their models; the table shows these names."""
    with torch.device("meta"):
        empty = GPT(config)
    exact: Any = random_weights(empty) if any(name.startswith("ours") for name in names) else None
    built: dict[str, Contender] = {}
    for name in names:
        print(f"  building {name}", file=sys.stderr, flush=True)
        if name == "ours, uncached float32":
            built[name] = uncached(exact)
        elif name.startswith("ours"):
            gpt = copy.deepcopy(exact)
            kind = name.removeprefix("ours, ")
            plain = kind in ("bfloat16", "float32")
            built[name] = ours(gpt.to(getattr(torch, kind)).prepack() if plain else gpt.quantise(kind, COMPUTE))
        else:
            built[name] = transformers_generate(config, name.split()[1])
        gc.collect()
    return built


NAMES = [
    *(f"ours, {name}" for name in cpu_dtypes() if name != "float32" or torch.float32 == COMPUTE),
    "ours, uncached float32",
    f"transformers dynamic cache, {COMPUTE_NAME}",
    f"transformers static cache, {COMPUTE_NAME}",
]


def measure(
    config: GPTConfig, rows: Sequence[int], repeats: int, names: Sequence[str]
) -> tuple[list[dict], list[float]]:
    """Seconds of every decoder for every number of images, in turns, and the memory bandwidth of each turn, bytes/s."""
    run = contenders(config, names)
    results, bandwidth = [], []
    for name in names:
        if name != "ours, uncached float32":
            run[name](rows[0])  # the first call of each makes kernels and memory ready
    for count in rows:
        times: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(repeats):
            bandwidth.append(read_bandwidth())
            for name in names:
                if name == "ours, uncached float32" and turn:
                    continue  # long, and its lengths were several measurements
                times[name].append(run[name](count))
                print(f"  {count} x {name}: {times[name][-1]:.2f} s", file=sys.stderr, flush=True)
        results += [{"rows": count, "name": n, "seconds": statistics.median(t), "runs": t} for n, t in times.items()]
    return results, bandwidth


def compare(results: list[dict], config: GPTConfig, machine: dict) -> None:
    """Add seconds per image, the speed-up of ours, and for ours the share of the floor to each result."""
    ours_seconds = {r["rows"]: r["seconds"] for r in results if r["name"] == DEFAULT}
    for result in results:
        rows = result["rows"]
        result["per_image"] = result["seconds"] / rows
        if rows in ours_seconds:
            result["ours_faster"] = result["seconds"] / ours_seconds[rows]
        if result["name"].startswith("ours") and "uncached" not in result["name"]:
            size = BYTES[result["name"].removeprefix("ours, ")]
            floor = floor_seconds(config, rows, size, config.block_size, machine, COMPUTE.itemsize)
            result["floor"], result["share"] = floor, floor / result["seconds"]


def to_table(report: dict) -> str:
    """Markdown table of a report."""
    lines = [in_words(report["machine"]), ""]
    what = f"{report['tokens']} tokens, {report['layers']} layers, median of {report['repeats']}"
    lines += [f"| {what} | images | s | s per image | of ours | of the floor |", "|---|---|---|---|---|---|"]
    for r in report["results"]:
        ratio = f"{r['ours_faster']:.2f}x" if "ours_faster" in r else ""
        share = f"{r['share']:.0%}" if "share" in r else ""
        note = " (extrapolated)" if "uncached" in r["name"] else ""
        lines.append(
            f"| {r['name']}{note} | {r['rows']} | {r['seconds']:.2f} | {r['per_image']:.2f} | {ratio} | {share} |"
        )
    if any("uncached" in r["name"] for r in report["results"]):
        lines += [
            "",
            f"The uncached loop is extrapolated: one forward pass at each of {SAMPLES} lengths, of at most "
            f"{UNCACHED_ROWS} images at once, times the number of tokens and images.",
        ]
    return "\n".join(lines)


@entry_point()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=at_least(1), nargs="+", default=[1, 8, 32], help="images at once")
    parser.add_argument("--tokens", type=at_least(1), default=256, help="tokens of an image; fewer make a shorter run")
    parser.add_argument("--layers", type=at_least(1), help="fewer layers than GPT2-medium's 24")
    parser.add_argument("--repeats", type=at_least(1), default=3, help="turns; medians are shown")
    parser.add_argument("--only", nargs="+", choices=NAMES, help="not all of them")
    parser.add_argument("--short", action="store_true", help="32 tokens of 1 and 8 images, once")
    parser.add_argument("--full", action="store_true", help="64 images too")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    if args.tokens > 1024:
        parser.error(f"--tokens is {args.tokens}; it must be at most 1024")
    if args.short:
        args.rows, args.tokens, args.repeats = [1, 8], min(args.tokens, 32), 1
    config = replace(load_config("coco").model.gpt, block_size=args.tokens)
    config = replace(config, n_layer=args.layers or config.n_layer)
    names = args.only or NAMES
    try:
        import transformers  # noqa: F401
    except ImportError:
        print("transformers is not installed (requirements-dev.txt): left out", file=sys.stderr)
        names = [name for name in names if not name.startswith("transformers")]
    rows = [*args.rows, 64] if args.full and 64 not in args.rows else args.rows
    machine = describe()
    results, bandwidth = measure(config, rows, args.repeats, names)
    machine["read_bytes_per_s"] = statistics.median([machine["read_bytes_per_s"], *bandwidth])
    compare(results, config, machine)
    report = {"machine": machine, "tokens": args.tokens, "layers": config.n_layer, "repeats": args.repeats}
    report["results"] = results
    print(json.dumps(report) if args.json else to_table(report))


if __name__ == "__main__":
    main()
