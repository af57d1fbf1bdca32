"""The description of a model folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from published import Source

from clipgen.errors import WeightsError
from clipgen.models.gpt import GPT
from clipgen.weights.describe import describe_model_dir


def test_parameters_memory_and_gpus_follow_from_the_files(hfailab: Source, tmp_path: Path) -> None:
    pipe = hfailab.convert(tmp_path / "out")
    facts = json.loads(json.dumps(describe_model_dir(tmp_path / "out")))
    assert facts["name"] == "tiny" and facts["config"]["gpt"]["n_embd"] == 32
    models = {"clip": pipe.clip, "vqgan": pipe.vqgan, "gpt": GPT(pipe.config.gpt)}  # that of the pipeline is packed
    for part, model in models.items():
        assert facts["parts"][part]["parameters"] == sum(p.numel() for p in model.parameters())
        assert facts["parts"][part]["bytes"] == (tmp_path / "out" / f"{part}.safetensors").stat().st_size
    assert facts["memory"]["float16"]["weights"] * 2 == facts["memory"]["float32"]["weights"]
    assert "T4 (64 candidates at a time)" in facts["gpus"]["float16"]
    assert not any("T4" in gpu for gpu in facts["gpus"]["bfloat16"])


def test_folder_or_file_that_is_missing_or_unreadable_is_named(hfailab: Source, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such folder"):
        describe_model_dir(tmp_path / "nowhere")
    hfailab.convert(tmp_path / "out")
    (tmp_path / "out" / "gpt.safetensors").write_bytes(b"PK")
    with pytest.raises(WeightsError, match=r"gpt\.safetensors is a PyTorch checkpoint|is not a"):
        describe_model_dir(tmp_path / "out")
    (tmp_path / "out" / "gpt.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"gpt\.safetensors does not exist"):
        describe_model_dir(tmp_path / "out")
