"""Published checkpoints: every name finds its place, nothing is dropped in silence. Numbers: test_vqgan, test_gpt."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clipgen.config import GPTConfig
from clipgen.errors import WeightsError
from clipgen.models.gpt import GPT
from clipgen.models.vqgan import VQGAN
from clipgen.weights.convert import map_hfailab_gpt, map_hfailab_vqgan, map_taming_vqgan
from train.config import load_config

HFAILAB = "hfailab_v0.1.0_state_dicts.json"
TAMING = "taming_vqgan_imagenet_f16_16384_state_dict.json"
Map = Callable[[dict[str, Tensor], Any], dict[str, Tensor]]


def meta(entries: dict[str, Any]) -> dict[str, Tensor]:
    return {n: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for n, (shape, dtype) in entries.items()}


def published(golden: Path, which: str) -> dict[str, Tensor]:
    if which == "taming":
        return meta(json.loads((golden / TAMING).read_text()))
    return meta(json.loads((golden / HFAILAB).read_text())[which])


COCO, IMAGENET = load_config("coco").model, load_config("imagenet").model
CASES = [  # listing, function, network, configuration, what is training state, one name to tamper with
    ("vqgan", map_hfailab_vqgan, VQGAN, COCO.vqgan, "discriminator.", "encoder.final.0.weight"),
    ("taming", map_taming_vqgan, VQGAN, IMAGENET.vqgan, "loss.", "encoder.mid.attn_1.q.weight"),
    ("gpt2_medium", map_hfailab_gpt, GPT, COCO.gpt, "mask", "blocks.23.encoder.norm2.bias"),
    ("gpt2_large", map_hfailab_gpt, GPT, GPTConfig(n_layer=36, n_head=20, n_embd=1280), "mask", "pos_emb"),
]
cases = pytest.mark.parametrize(
    ("which", "convert", "kind", "config", "state", "name"), CASES, ids=[c[0] for c in CASES]
)


@cases
def test_every_published_tensor_maps(
    golden: Path, which: str, convert: Map, kind: type[VQGAN | GPT], config: Any, state: str, name: str
) -> None:
    theirs = published(golden, which)
    ours = convert(theirs, config)
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in kind(config).state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.items()} == expected
    # Not one number is lost or used twice.
    weights = sum(tensor.numel() for name, tensor in theirs.items() if state not in name)
    assert sum(tensor.numel() for tensor in ours.values()) == weights


@cases
def test_strict_both_ways(
    golden: Path, which: str, convert: Map, kind: type[VQGAN | GPT], config: Any, state: str, name: str
) -> None:
    theirs = published(golden, which)
    with pytest.raises(WeightsError, match=f"1 missing: {name}"):
        convert({n: t for n, t in theirs.items() if n != name}, config)
    with pytest.raises(WeightsError, match=r"1 unexpected: optimizer\.step"):
        convert(theirs | {"optimizer.step": torch.zeros(())}, config)
    with pytest.raises(WeightsError, match=rf"{name} has the shape \(3,\)"):
        convert(theirs | {name: torch.zeros(3)}, config)


def test_another_size_is_refused(golden: Path) -> None:
    with pytest.raises(WeightsError, match="HFAiLab GPT's"):
        map_hfailab_gpt(published(golden, "gpt2_large"), COCO.gpt)
    with pytest.raises(WeightsError, match="CompVis VQGAN's"):
        map_taming_vqgan(published(golden, "vqgan"), COCO.vqgan)
    with pytest.raises(WeightsError, match="HFAiLab VQGAN's"):
        map_hfailab_vqgan(published(golden, "vqgan"), replace(COCO.vqgan, ch=64))


def test_the_discriminator_of_a_lightning_checkpoint_is_left_out(golden: Path) -> None:
    theirs = published(golden, "taming")
    extra = {"loss.discriminator.main.0.weight": torch.zeros(1), "loss.logvar": torch.zeros(())}
    assert map_taming_vqgan(theirs | extra, IMAGENET.vqgan).keys() == map_taming_vqgan(theirs, IMAGENET.vqgan).keys()
