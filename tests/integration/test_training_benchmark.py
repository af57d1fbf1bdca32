"""The benchmark of training: counted operations, recipes and table, on a tiny model whose rates mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training
from machine import MACHINE
from torch.utils.flop_counter import FlopCounterMode
from training_kit import write_config

from clipgen.config import GPTConfig, ModelConfig
from clipgen.models.gpt import GPT
from train.config import Config, load_config


@pytest.fixture
def config(tiny_config: ModelConfig, tmp_path: Path) -> Config:
    return load_config(write_config(tiny_config, tmp_path / "tiny.yaml"), ["stage2.neighbours=0"])


def test_gpt_flops_equal_the_counted_operations_of_a_step() -> None:
    config = GPTConfig(n_layer=3, n_head=2, n_embd=64, vocab_size=300, block_size=48, n_cond=8)
    with torch.device("meta"):
        gpt, tokens, condition = GPT(config), torch.zeros(2, 47, dtype=torch.long), torch.zeros(2, 8)
    with FlopCounterMode(display=False) as counter:
        gpt(tokens, condition).sum().backward()
    assert training.gpt_flops(config) == pytest.approx(counter.get_total_flops() / 2, rel=0.01)


def test_float32_products_are_timed_in_the_precision_of_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert (training.convolution_precision(cpu), training.convolution_precision(gpu)) == ("highest", "high")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert training.convolution_precision(gpu) == "highest"
    before, seen = torch.get_float32_matmul_precision(), []
    monkeypatch.setattr(training, "convolution_precision", lambda device: "high")
    monkeypatch.setattr(training, "seconds", lambda product: seen.append(torch.get_float32_matmul_precision()) or 1.0)
    training.matrix_rate("no", cpu)
    assert seen == ["high"] and torch.get_float32_matmul_precision() == before


def test_stage1_flops_are_counted_with_and_without_the_gan(config: Config) -> None:
    convolution = 2 * 8 * 8 * 48 * 32 * 9  # one of many: 4 x 4 pixels folded into 48 channels, then a 3 x 3 kernel
    plain = training.stage1_flops(replace(config, stage1=replace(config.stage1, disc_start=99)))
    assert plain > 6 * convolution
    assert training.stage1_flops(config) > 1.05 * plain


def test_every_recipe_runs_and_is_in_the_table(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "matrix_rate", lambda *_: 1e9)  # seconds
    cpu = torch.device("cpu")
    small = replace(config, model=replace(config.model, gpt=replace(config.model.gpt, n_cond=384)))
    images = training.write_noise_images(tmp_path / "images", 32)
    found = [{"part": "stage 1, plain", **training.measure_stage1(config, "plain", 1, images, cpu)}]
    for source in ("pixels", "tokens"):
        part = training.measure_stage2(small, source, 1, images, cpu)
        assert part["tokens_per_s"] == pytest.approx(16 * 4 / part["seconds"])
        found.append({"part": f"stage 2, from {source}", **part})
    results = [row | {"flops_per_image": 1e6, "share": 0.25} for row in found]
    results[1] |= {"flops_per_image": None, "share": None}
    table = training.to_table({"machine": MACHINE, "gpu": None, "results": results})
    assert "| 1.00x |" in table and "25% of" in table and table.count("\n| stage") == 3


@pytest.mark.slow
def test_training_benchmark_runs_as_a_script(config: Config, root: Path, tmp_path: Path) -> None:
    flags = ["--config", tmp_path / "tiny.yaml", "--steps", 1, "--recipes", "channels-last", "--json"]
    command = [sys.executable, root / "benchmarks" / "training.py", *flags, "model.gpt.n_cond=384"]
    more = ["stage2.neighbours=0", "stage2.precision=bf16"]
    done = subprocess.run([*map(str, command), *more], check=True, capture_output=True, text=True, cwd=tmp_path)
    report = json.loads(done.stdout)
    parts = ["stage 1, channels-last", "stage 2, from pixels", "stage 2, from tokens"]
    assert [row["part"] for row in report["results"]] == parts
    # For a tiny model the share of the matrix rate means nothing; with emulated bfloat16 it may be any number.
    assert [row["share"] is None for row in report["results"]] == [False, True, False]
    assert all((row["share"] is None or row["share"] > 0) and row["images_per_s"] > 0 for row in report["results"])
