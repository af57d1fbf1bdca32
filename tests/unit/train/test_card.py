"""Model cards, read by the parser of the Hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from clipgen.config import ModelConfig
from clipgen.weights.describe import describe_model_dir
from train.card import card, hub_metadata
from train.config import Config

EVALUATION = {
    "reference": {"sha256": "0" * 64, "count": 24},
    "prompts": {"count": 24, "what": "variations"},
    "features": {"what": "CLIP"},
    "figures": {"fid": {"0": 12.5}},
    "left_out": {"caps": "no captioner"},
    "warnings": [],
}


def test_hub_parses_the_metadata_of_the_card(tiny_config: ModelConfig, tiny_weights: Path) -> None:
    config = Config(model=tiny_config)
    text = card(describe_model_dir(tiny_weights), config, "photos", EVALUATION, {"stage1": 1.0}, ["a lemon"])
    data = ModelCard(text).data.to_dict()
    assert (data["library_name"], data["pipeline_tag"], data["license"]) == ("clipgen", "text-to-image", "other")
    assert data["widget"] == [{"text": "a lemon", "output": {"url": "samples.jpg"}}]
    assert "\n# tiny\n" in text and "| fid, 0 | 12.5 |" in text


@pytest.mark.parametrize("prompt", ['a "lemon": yes', "no", "- # not a comment", "zitrone ü 🍋", "'"])
def test_metadata_of_the_card_keeps_any_prompt(prompt: str) -> None:
    widget = ModelCard(hub_metadata([prompt]) + "# x").data.to_dict()["widget"]
    assert widget[0]["text"] == prompt


def test_card_of_the_mini_model_has_metadata_and_its_image(root: Path) -> None:
    data = ModelCard.load(root / "weights" / "mini" / "README.md").data.to_dict()
    assert (data["library_name"], data["pipeline_tag"], data["license"]) == ("clipgen", "text-to-image", "mit")
    assert all((root / "weights" / "mini" / entry["output"]["url"]).is_file() for entry in data["widget"])
