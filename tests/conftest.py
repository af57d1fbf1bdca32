"""What many tests need: paths, and a whole model small enough to make in a moment."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from published import Source, write_hfailab, write_torchscript

from clipgen.config import GPTConfig, ModelConfig, VQGANConfig
from clipgen.models.clip import OpenAIClip
from clipgen.models.gpt import GPT
from clipgen.models.vqgan import VQGAN
from clipgen.request import SamplingParams
from clipgen.weights.model_dir import save_model_dir

ROOT = Path(__file__).resolve().parent.parent


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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = OpenAIClip(
            embed_dim=32,
            image_resolution=32,
            vision_layers=2,
            vision_width=64,
            vision_patch_size=8,
            context_length=16,
            vocab_size=49408,
            transformer_width=64,
            transformer_heads=1,
            transformer_layers=2,
        )
        vqgan, gpt = VQGAN(tiny_config.vqgan), GPT(tiny_config.gpt)
    with torch.no_grad():  # an untrained decoder paints grey and an untrained GPT hardly listens: make both vivid
        vqgan.decoder.conv_out.weight.mul_(4)
        gpt.head.weight.mul_(20)
    parts = {"clip": clip.state_dict(), "vqgan": vqgan.state_dict(), "gpt": gpt.state_dict()}
    return save_model_dir(tmp_path_factory.mktemp("weights") / "tiny", tiny_config, parts)


@pytest.fixture
def hfailab(golden: Path, tmp_path: Path) -> Source:
    """Files as HFAiLab publishes its own, tiny."""
    return write_hfailab(golden, tmp_path)


@pytest.fixture(scope="session")
def torchscript(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as OpenAI publishes its own, tiny."""
    return write_torchscript(golden, tmp_path_factory.mktemp("openai") / "ViT-tiny.pt")
