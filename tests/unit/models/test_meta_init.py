"""Networks made by meta_init have the real names, shapes and dtypes, and loading imports no compiler."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from clipgen.config import GPTConfig, VQGANConfig
from clipgen.models.clip import OpenAIClip
from clipgen.models.gpt import GPT
from clipgen.models.meta_init import meta_init
from clipgen.models.vqgan import VQGAN


@pytest.mark.parametrize(
    "make",
    [
        lambda: GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=8, block_size=4, n_cond=6)),
        lambda: VQGAN(VQGANConfig(16, 1, 32, [1, 2], 1, [8], 8, 4, 8)),
        lambda: OpenAIClip(16, 32, 2, 64, 8, 12, 100, 64, 1, 2),  # a ViT
        lambda: OpenAIClip(16, 32, (1, 1, 1, 1), 8, None, 12, 100, 64, 1, 2),  # a ResNet
    ],
)
def test_meta_network_has_the_names_shapes_and_dtypes_of_the_real_one(make: Callable[[], nn.Module]) -> None:
    with meta_init():
        meta = make()
    assert all(value.is_meta for value in meta.state_dict().values())
    whole = {name: (value.shape, value.dtype) for name, value in make().state_dict().items()}
    assert {name: (value.shape, value.dtype) for name, value in meta.state_dict().items()} == whole


def test_initialisation_works_again_after_the_context() -> None:
    with meta_init():
        pass
    assert nn.init.constant_(torch.randn(3).mul(2), 5.0).tolist() == [5.0] * 3


def test_generating_imports_no_compiler(tiny_weights: Path, root: Path) -> None:
    code = (
        "import sys\nfrom clipgen import ClipGen\n"
        f"ClipGen.from_pretrained({str(tiny_weights)!r}, device='cpu')('a', candidates=2)\n"
        "print([name for name in ('torch._dynamo', 'torch._inductor', 'sympy') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=root, timeout=600
    )
    assert done.stdout == "[]\n"
