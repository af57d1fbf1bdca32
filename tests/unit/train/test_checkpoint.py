"""A damaged checkpoint is named together with the older one to continue from; other images are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from train.config import Stage1Config
from train.loop.checkpoint import CheckpointError, Checkpoints, fixed_settings


@pytest.fixture
def model() -> torch.nn.Linear:
    return torch.nn.Linear(3, 3)


@pytest.fixture
def checkpoints(model: torch.nn.Linear, tmp_path: Path) -> Checkpoints:
    """Checkpoints of steps 1, 2 and 3, in which all weights equal the step."""
    accelerator = Accelerator(cpu=True)
    accelerator.register_for_checkpointing(model)
    checkpoints = Checkpoints(accelerator, tmp_path, keep=3, fixed=fixed_settings(Stage1Config(), "a" * 64))
    for step in (1, 2, 3):
        with torch.no_grad():
            model.weight.fill_(step)
        checkpoints.save(step)
    return checkpoints


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def forget_sizes(path: Path) -> None:
    state = json.loads((path / "state.json").read_text())
    del state["files"]
    (path / "state.json").write_text(json.dumps(state))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights cut off": (lambda path: cut(path / "custom_checkpoint_0.pkl"), r"custom_checkpoint_0\.pkl has \d+ of \d+"),
    "weights missing": (lambda path: (path / "custom_checkpoint_0.pkl").unlink(), r"custom_checkpoint_0\.pkl has 0 of"),
    "random state cut off": (lambda path: cut(path / "random_states_0.pkl"), r"random_states_0\.pkl has"),
    "state empty": (lambda path: (path / "state.json").write_text(""), r"state\.json is empty"),
    "state cut off": (lambda path: cut(path / "state.json"), r"state\.json is no JSON"),
    "state of something else": (lambda path: (path / "state.json").write_text("[1]"), r"state\.json lacks"),
    "cut off, saved by an earlier version": (
        lambda path: (forget_sizes(path), cut(path / "custom_checkpoint_0.pkl")),
        "damaged",
    ),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_checkpoint_names_an_intact_one_that_resume_step_continues(
    how: str, checkpoints: Checkpoints, model: torch.nn.Linear
) -> None:
    damage, said = DAMAGE[how]
    damage(checkpoints.folder / "step_000003")
    with pytest.raises(CheckpointError, match=said) as error:
        checkpoints.load()
    message = str(error.value)
    assert "step_000003 is damaged" in message and "\n" not in message
    assert "that of step 2 is intact: add --resume-step 2 to continue from it" in message
    assert (checkpoints.folder / "step_000003").is_dir(), "nothing is removed unless asked"
    assert checkpoints.load(2) == 2
    assert model.weight.eq(2).all()
    assert [path.name for path in sorted(checkpoints.folder.iterdir())] == ["step_000001", "step_000002"]


def test_damaged_older_checkpoints_are_not_recommended(checkpoints: Checkpoints) -> None:
    for step in (2, 3):
        cut(checkpoints.folder / f"step_00000{step}" / "custom_checkpoint_0.pkl")
    with pytest.raises(CheckpointError, match="that of step 1 is intact"):
        checkpoints.load()
    (checkpoints.folder / "step_000001" / "state.json").write_text("")
    with pytest.raises(CheckpointError, match="no older one is intact: delete it to start again"):
        checkpoints.load()


def test_missing_checkpoint_is_refused_with_the_list_of_existing_ones(checkpoints: Checkpoints) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint of step 7; there is 1, 2, 3"):
        checkpoints.load(7)


def test_checkpoint_of_other_images_is_refused_and_of_earlier_versions_loaded(checkpoints: Checkpoints) -> None:
    fixed = fixed_settings(Stage1Config(), "b" * 64)
    others = Checkpoints(checkpoints.accelerator, checkpoints.out, fixed=fixed)
    with pytest.raises(CheckpointError, match="was trained with images aaaaaaaaaaaaaaaa, not bbbbbbbbbbbbbbbb"):
        others.load()
    path = checkpoints.folder / "step_000003" / "state.json"
    state = json.loads(path.read_text())
    del state["fixed"]["images"], state["files"]
    path.write_text(json.dumps(state))
    assert others.load() == 3


def test_checkpoint_of_another_precision_is_resumed_with_a_new_loss_scale(checkpoints: Checkpoints) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    checkpoints.accelerator.scaler = scaler
    assert checkpoints.load() == 3
    assert checkpoints.accelerator.scaler is scaler and scaler.state_dict()["scale"] == 64.0


def test_copy_of_a_checkpoint_under_another_name_is_left_alone(checkpoints: Checkpoints) -> None:
    shutil.copytree(checkpoints.folder / "step_000002", checkpoints.folder / "step_000002_backup")
    assert checkpoints.load() == 3
    assert (checkpoints.folder / "step_000002_backup").is_dir()


def test_decoder_alone_is_not_resumed_from_a_training_of_the_whole_vqgan(checkpoints: Checkpoints) -> None:
    config = Stage1Config(only_decoder=True, init="vqgan.safetensors", revive_every=0)
    other = Checkpoints(checkpoints.accelerator, checkpoints.out, fixed=fixed_settings(config, "a" * 64))
    with pytest.raises(CheckpointError, match="was trained with only_decoder False, not True"):
        other.load()
