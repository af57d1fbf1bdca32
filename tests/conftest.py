"""Shared fixtures: paths, and a complete model small enough to build in a moment."""

from __future__ import annotations

import os
import signal
from pathlib import Path

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a job in the background: programs under test would ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:  # before PyTorch is imported: as many workers as cores, a thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings
from published import Source, write_hfailab, write_torchscript
from tiny_weights import write_tiny_weights

from clipgen.config import GPTConfig, ModelConfig, VQGANConfig
from clipgen.request import SamplingParams
from clipgen.utils.cpu import thread_count, usable_cores

ROOT = Path(__file__).resolve().parent.parent

for name in [name for name in os.environ if name == "ARGS" or name.startswith(("MAKE", "MFLAGS"))]:
    del os.environ[name]  # of `make test ARGS=...`: the makes that tests run would take them for theirs

# Beside another suite an example takes as long as it takes.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: a worker for each core that affinity, quota and CLIPGEN_THREADS leave, at most eight of a gigabyte."""
    return min(thread_count(usable_cores()), 8)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def golden() -> Path:
    """Reference tensors of the original implementations."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """32 px in 4 x 4 tokens of 64 codes, two GPT layers, embeddings of 32 numbers."""
    return ModelConfig(
        name="tiny",
        vqgan=VQGANConfig(
            image_size=32,
            patch=4,
            ch=32,
            ch_mult=[1, 1],
            num_res_blocks=1,
            attn_resolutions=[],
            z_channels=32,
            embed_dim=8,
            codebook_size=64,
            l2_codes=True,
        ),
        gpt=GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=64, block_size=16, n_cond=32),
        sampling=SamplingParams(top_k=32, top_p=0.95, guidance=2.0),
    )


@pytest.fixture(scope="session")
def tiny_weights(tiny_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete folder of weights drawn from a fixed seed. Copy it before changing anything in it."""
    return write_tiny_weights(tmp_path_factory.mktemp("weights") / "tiny", tiny_config)


@pytest.fixture
def hfailab(golden: Path, tmp_path: Path) -> Source:
    """Tiny files in the format of HFAiLab's published ones."""
    return write_hfailab(golden, tmp_path)


@pytest.fixture(scope="session")
def torchscript(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny file in the format of OpenAI's published one."""
    return write_torchscript(golden, tmp_path_factory.mktemp("openai") / "ViT-tiny.pt")
