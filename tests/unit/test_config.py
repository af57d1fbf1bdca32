"""Configurations: presets, files, overrides, and messages for values that cannot work."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from clipgen.config import GPTConfig, ModelConfig, VQGANConfig, load_model_config, load_preset
from clipgen.errors import ConfigError, RequestError
from clipgen.request import SamplingParams
from train.config import Config, Stage1Config, Stage2Config, TrainConfig, load_config


def test_mini_gpt_has_fewer_than_20_million_parameters() -> None:
    model = load_config("mini").model
    assert model.name == "mini"
    assert model.gpt.block_size <= 256
    assert 12 * model.gpt.n_layer * model.gpt.n_embd**2 + 2 * model.gpt.vocab_size * model.gpt.n_embd < 20e6


def test_coco_has_the_sizes_of_the_released_model() -> None:
    model = load_config("coco").model
    assert (model.vqgan.image_size, model.vqgan.num_tokens) == (256, 256)
    assert (model.vqgan.codebook_size, model.vqgan.embed_dim) == (16384, 256)
    assert (model.gpt.n_layer, model.gpt.n_embd, model.gpt.n_head, model.gpt.n_cond) == (24, 1024, 16, 512)
    assert (model.sampling.top_k, model.sampling.top_p, model.sampling.guidance) == (500, 0.95, 1.0)


def test_imagenet_gpt_has_the_sizes_of_gpt2_xl() -> None:
    model = load_config("imagenet").model
    assert (model.gpt.n_layer, model.gpt.n_embd, model.gpt.n_head) == (48, 1600, 25)
    assert model.vqgan.num_tokens == 256


def test_overrides_change_only_the_named_settings() -> None:
    config = load_config("mini", ["stage1.lr=1e-4", "model.vqgan.beta=0.5"])
    assert config.stage1.lr != load_config("mini").stage1.lr
    assert config.stage1.lr == 1e-4
    assert config.model.vqgan.beta == 0.5
    assert config.stage2 == load_config("mini").stage2


def test_file_changes_only_the_settings_it_names(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: {name: mine}\nstage2: {steps: 7}")
    config = load_config(path)
    assert (config.model.name, config.stage2.steps) == ("mine", 7)
    assert config.model.gpt == GPTConfig()


def test_configuration_of_earlier_versions_loads_unless_its_gpt_saw_two_embeddings(tmp_path: Path) -> None:
    path, today = tmp_path / "config.yaml", OmegaConf.structured(load_config("mini").model)
    old = OmegaConf.create(OmegaConf.to_container(today))
    old.prior, old.gpt.n_things = "training_index", 1
    OmegaConf.save(old, path)
    assert load_model_config(path) == OmegaConf.to_object(today)
    old.gpt.n_things = 2
    OmegaConf.save(old, path)
    with pytest.raises(ConfigError, match=r"n_things is not 1: these weights are of an earlier version"):
        load_model_config(path)


@pytest.mark.parametrize("name", ["mini", "coco", "imagenet"])
def test_saved_model_configuration_loads_unchanged(name: str, tmp_path: Path) -> None:
    model = load_config(name).model
    OmegaConf.save(OmegaConf.structured(model), tmp_path / "config.yaml")
    assert load_model_config(tmp_path / "config.yaml") == model


# --- refusals ---


BASE = """
model:
  vqgan: {image_size: 144, patch: 6, ch: 128, ch_mult: [1, 1], codebook_size: 2048}
  gpt: {n_head: 6, n_embd: 384, vocab_size: 2048, block_size: 144}
"""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.gpt.n_head=5", "gpt.n_embd 384 is not divisible by n_head 5"),
        ("model.gpt.n_head=0", "gpt.n_head is 0; it must be at least 1"),
        ("model.gpt.dropout=1", "gpt.dropout is 1.0; it must be in"),
        ("model.gpt.vocab_size=64", "gpt.vocab_size 64 differs from vqgan.codebook_size 2048"),
        ("model.gpt.block_size=64", "gpt.block_size 64 differs from the image's 144 tokens"),
        ("model.vqgan.ch=48", "vqgan.ch is 48; GroupNorm needs a multiple of 32"),
        ("model.vqgan.ch_mult=[]", "vqgan.ch_mult has 0 multipliers; give 1 to 16"),
        ("model.gpt.n_layer=10000000", "gpt.n_layer is 10000000; it must be at most 1024"),
        ("model.vqgan.num_res_blocks=10000000", "vqgan.num_res_blocks is 10000000"),
        (f"model.name={'x' * 101}", "name has 101 characters; it must have at most 100"),
        ("model.vqgan.ch_mult=[1,0]", "vqgan.ch_mult"),
        ("model.vqgan.image_size=145", "vqgan.image_size 145 is no multiple of"),
        ("model.vqgan.image_size=-144", "vqgan.image_size is -144"),
        ("model.vqgan.image_size=wide", "image_size"),
        ("model.vqgan.codebook_size=1", "vqgan.codebook_size is 1; it must be at least 2"),
        ("model.vqgan.beta=-1", "vqgan.beta is -1"),
        ("model.vqgan.beta=nan", "vqgan.beta is nan"),
        ("model.vqgan.norm_eps=0", "vqgan.norm_eps is 0"),
        ("model.sampling.top_p=0", "top_p is 0.0; it must be above 0 and at most 1"),
        ("model.sampling.top_p=nan", "top_p is nan"),
        ("model.sampling.top_k=-1", "top_k is -1; it must be a whole number from 0"),
        ("model.sampling.temperature=inf", "temperature is inf; it must be a number from 0 to 10"),
        ("model.sampling.guidance=31", "guidance is 31.0; it must be a number from 0 to 30"),
        ("model.sampling.guidance=null", "guidance"),
        ("model.colour=red", "colour"),
        ("stage1.lr=0", "lr is 0.0; it must be positive"),
        ("stage1.lr=nan", "lr is nan"),
        ("stage1.precision=fp8", "precision is 'fp8'; use no, bf16 or fp16"),
        ("stage1.perceptual=vgg", "perceptual is 'vgg'; use efficientnet, lpips or none"),
        ("stage1.betas=[0.9]", "betas"),
        ("stage1.ema=1", "ema is 1"),
        ("stage1.min_scale=0", "min_scale is 0"),
        ("stage1.warmup=-1", "warmup is -1"),
        ("stage1.disc_regularisation=r1", "disc_regularisation_weight is 0.0 with disc_regularisation=r1; use a pos"),
        ("stage1.disc_regularisation_weight=1", "use 0 with none"),
        ("stage1.codes=kmeans", "codes is 'kmeans'; use gradient or ema"),
        ("stage1.only_decoder=true", "only_decoder is true with init=, codes=gradient"),
        ("stage1.accumulate=0", "accumulate is 0; it must be at least 1"),
        ("stage2.parallel=fsdp2", "parallel is 'fsdp2'; use ddp or fsdp"),
        ("stage2.clip_weight=-1", "clip_weight is -1.0"),
        ("stage2.batch_size=0", "batch_size is 0; it must be at least 1"),
        ("stage2.condition_dropout=1", "condition_dropout is 1.0; use [0, 1)"),
        ("stage2.noise_angle=90", "noise_angle is 90.0 degrees; use [0, 90)"),
        ("stage2.views=0", "views is 0"),
        ("stage2.min_scale=1.5", "min_scale is 1.5"),
        ("stage2.views=3", "views is 3 with min_scale=1; whole images have two"),
        ("=3", ""),
    ],
)
def test_bad_value_is_refused_with_file_name_and_value(override: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["maxi", "nowhere/mine.yaml", "", "mini.yml"])
def test_unknown_configuration_is_refused_with_the_list_of_names(name: str) -> None:
    with pytest.raises(ConfigError, match=r"use one of coco, imagenet, mini, photos, or the path of a \.yaml file"):
        load_config(name)


@pytest.mark.parametrize(
    "text", ["{", "\x00", "- a\n- list", "just words", "model: 3", "a: *b", "model: {name: ${x}}", "? [a]\n: b"]
)
def test_file_that_is_no_configuration_is_refused_by_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    for load in (load_config, load_preset):
        with pytest.raises(ConfigError, match=r"broken\.yaml: "):
            load(path)


def test_weights_without_a_configuration_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml is missing"):
        load_model_config(tmp_path / "config.yaml")


@given(temperature=st.floats(), top_k=st.integers(), top_p=st.floats(), guidance=st.floats())
def test_sampling_params_accept_exactly_their_ranges(
    temperature: float, top_k: int, top_p: float, guidance: float
) -> None:
    good = 0 <= temperature <= 10 and 0 <= top_k < 2**31 and 0 < top_p <= 1 and 0 <= guidance <= 30
    try:
        config = SamplingParams(temperature, top_k, top_p, guidance)
    except RequestError as error:
        assert not good
        assert any(name in str(error) for name in ("temperature", "top_k", "top_p", "guidance"))
    else:
        assert good
        assert all(math.isfinite(value) for value in asdict(config).values())


@given(patch=st.integers(-1, 8), levels=st.integers(0, 5), size=st.integers(-8, 300), codebook=st.integers(-1, 100))
def test_valid_vqgan_has_a_grid_that_covers_its_image(patch: int, levels: int, size: int, codebook: int) -> None:
    try:
        config = VQGANConfig(image_size=size, patch=patch, ch_mult=[1] * levels, codebook_size=codebook)
    except ConfigError as error:
        assert "vqgan." in str(error)
    else:
        assert config.grid * config.downsampling == size
        assert config.num_tokens >= 1


@pytest.mark.parametrize(
    "kind", [Config, ModelConfig, VQGANConfig, GPTConfig, SamplingParams, TrainConfig, Stage1Config, Stage2Config]
)
def test_defaults_are_valid(kind: type) -> None:
    kind()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "muon", "parallel": "fsdp"}, "optimizer is muon with parallel=fsdp and precision=bf16"),
        ({"optimizer": "muon", "precision": "fp16"}, "optimizer is muon with parallel=ddp and precision=fp16"),
        ({"parallel": "fsdp", "precision": "fp16"}, "precision is fp16 with parallel=fsdp; use bf16 or no"),
        ({"clip_weight": 0.2, "clip_batch": 7}, "clip_batch is 7; it must divide batch_size, 64"),
    ],
)
def test_incompatible_settings_of_stage2_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Stage2Config(**settings)


def test_yaml_no_without_quotes_is_read_as_precision_no() -> None:
    assert load_config("mini", ["stage1.precision=no", 'stage2.precision="no"']).stage1.precision == "no"


@pytest.mark.parametrize(
    "text",
    [
        "name: ${oc.env:CLIPGEN_TEST_SECRET}",
        'name: "\\x24{oc.env:CLIPGEN_TEST_SECRET}"',
        "sampling: {top_k: '${oc.decode:${oc.env:CLIPGEN_TEST_SECRET}}'}",
        "gpt: ${oc.env:CLIPGEN_TEST_SECRET}",
    ],
)
def test_folder_of_weights_cannot_read_the_environment(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPGEN_TEST_SECRET", "12345")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"holds \$\{\.\.\.\}; a folder of weights must state its values") as caught:
        load_model_config(tmp_path / "config.yaml")
    assert "12345" not in str(caught.value)


@pytest.mark.parametrize("text", ["42", "[1, 2]", "a", "[" * 5000, ": : :", "\x00"])
def test_file_that_is_no_mapping_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml: "):
        load_model_config(tmp_path / "config.yaml")
