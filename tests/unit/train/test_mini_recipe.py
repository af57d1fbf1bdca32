"""The mini model's recipe: the command of each part, carried weights, and a whole run at a tiny budget."""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from scene_kit import RENDERS, scenes
from training_kit import run

from clipgen import ClipGen
from clipgen.errors import WeightsError
from clipgen.weights.model_dir import load_model_dir
from train.mini import recipe
from train.mini.attachments import ATTACHMENTS
from train.mini.describe import describe
from train.mini.image_tower import init_tower
from train.mini.labels import Heads
from train.mini.objects import read_objects
from train.mini.recipe import CONFIG, SHIPPED, Machine, carry, part_command, unpack
from train.mini.scene_index import add_scene_index
from train.mini.towers import EMBED_DIM, build_clip, embed, open_scenes

CPU = Machine(0, False)
ROOT = Path(__file__).parents[3]
SHIPPED_CLIP = SHIPPED / "clip.safetensors"


def arguments(tmp_path: Path, **changes: object) -> argparse.Namespace:
    values = {"data": "d", "work": tmp_path / "w", "out": tmp_path / "o", "wordnet": Path("wn"), "config": CONFIG}
    return argparse.Namespace(**{**values, "start": None, "minutes": None, "overrides": [], **changes})


def test_vqgan_sees_all_scenes_and_gpt_those_not_held_out(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    assert "train.mini.source:all_scenes=d" in part_command("vqgan", args, CPU)
    assert "train.mini.source:trained_scenes=d" in part_command("gpt", args, CPU)
    assert all("stage2.from_pixels=true" in part_command(part, args, CPU) for part in ("plain", "gpt"))
    assert "stage1.min_scale=1.0" in part_command("vqgan", args, CPU), "crops would move figures off the grid"


def test_gpt_goes_on_from_what_it_learned_of_plain_scenes(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    plain = part_command("plain", args, CPU)
    assert "train.mini.source:plain_scenes=d" in plain and "train.mini.source:seen_plain_scenes=d" in plain
    assert not any("init=" in text for text in part_command("gpt", args, CPU))
    (args.work / "plain").mkdir(parents=True)
    (args.work / "plain" / "gpt.safetensors").touch()
    assert f"stage2.init={args.work / 'plain' / 'gpt.safetensors'}" in part_command("gpt", args, CPU)


def test_gpt_sees_each_scene_in_another_layout_than_it_generates(tmp_path: Path) -> None:
    line = part_command("gpt", arguments(tmp_path), CPU)
    assert line[line.index("--seen") + 1] == "train.mini.source:seen_scenes=d"


def test_cores_of_a_cpu_share_the_steps_of_vqgan_and_gpt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    four = Machine(0, False, processes=4)
    for part in ("vqgan", "gpt"):
        line = part_command(part, arguments(tmp_path), four)
        assert line[line.index("--nproc-per-node") + 1] == "4"
        assert "train.loop.launch" not in part_command(part, arguments(tmp_path), CPU)
    assert "train.loop.launch" not in part_command("text", arguments(tmp_path), four)
    for threads, processes in (("1", 1), ("3", 2), ("5", 4), ("64", 8)):
        monkeypatch.setenv("CLIPGEN_THREADS", threads)
        assert Machine.here().processes == (1 if Machine.here().has_gpu else processes)


def test_precision_that_gpt_cannot_train_in_is_refused_before_the_first_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr(recipe, "run_step", lambda *_: pytest.fail("a part was started"))
    with pytest.raises(SystemExit) as stopped:
        run(recipe, monkeypatch, "--work", tmp_path, "stage2.optimizer=adamw", "stage2.precision=fp16")
    assert stopped.value.code == 2 and "precision=fp16 needs a GPU" in capsys.readouterr().err


def test_overrides_reach_only_their_part(tmp_path: Path) -> None:
    args = arguments(tmp_path, overrides=["image.steps=5", "stage2.steps=7"], minutes=9.0)
    image, gpt, vqgan = (part_command(part, args, CPU) for part in ("image", "gpt", "vqgan"))
    assert "steps=5" in image and "stage2.steps=7" not in image
    assert "stage2.steps=7" in gpt and "steps=5" not in gpt
    assert "stage2.steps=7" not in vqgan
    assert image[image.index("--minutes") + 1] == "9"


def test_gpu_gets_larger_batches_and_more_workers(tmp_path: Path) -> None:
    gpu = part_command("gpt", arguments(tmp_path), Machine(14, True))
    assert "stage2.batch_size=256" in gpu and "stage2.workers=14" in gpu


def test_carried_weights_start_a_part_that_has_no_checkpoint(tmp_path: Path) -> None:
    work, start = tmp_path / "w", tmp_path / "carried"
    (work / "vqgan").mkdir(parents=True)
    save_file({"a": torch.rand(3), "n": torch.arange(3)}, work / "vqgan" / "vqgan.safetensors")
    carry("vqgan", work)
    halves = load_file(work / "weights" / "vqgan.safetensors")
    assert halves["a"].dtype == torch.float16 and halves["n"].dtype == torch.int64
    shutil.copytree(work / "weights", start)
    shutil.rmtree(work / "vqgan")
    unpack(start, work)
    args = arguments(tmp_path, start=start)
    assert f"stage1.init={work / 'vqgan' / 'vqgan.safetensors'}" in part_command("vqgan", args, CPU)
    assert not any("init=" in text for text in part_command("gpt", args, CPU))  # nothing of it was carried
    (start / "gpt.safetensors").touch()
    unpack(start, work)
    for part in ("plain", "gpt"):  # both go on from the GPT that was carried
        assert f"stage2.init={work / 'plain' / 'gpt.safetensors'}" in part_command(part, args, CPU)
    (work / "vqgan" / "checkpoints").mkdir()
    assert not any("init=" in text for text in part_command("vqgan", args, CPU))


def test_gpt_of_plain_scenes_is_carried_until_that_of_all_takes_its_place(tmp_path: Path) -> None:
    work = tmp_path / "w"
    for part, value in (("plain", 1.0), ("gpt", 2.0)):
        (work / part).mkdir(parents=True)
        save_file({"a": torch.full((2,), value)}, work / part / "gpt.safetensors")
        carry(part, work)
        assert load_file(work / "weights" / "gpt.safetensors")["a"].tolist() == [value, value]


def test_carried_parts_are_there_for_the_next_part_and_never_replace_newer_ones(tmp_path: Path) -> None:
    start, work = tmp_path / "carried", tmp_path / "w"
    start.mkdir()
    for name, value in (("image", 1.0), ("text", 2.0), ("vqgan", 3.0)):
        save_file({name: torch.full((2,), value)}, start / f"{name}.safetensors")
    (work / "vqgan").mkdir(parents=True)
    save_file({"newer": torch.ones(1)}, work / "vqgan" / "vqgan.safetensors")
    unpack(start, work)
    clip = load_file(work / "clip" / "clip.safetensors")
    assert clip.keys() == {"text", "visual.image"} and clip["visual.image"].tolist() == [1.0, 1.0]
    assert load_file(work / "vqgan" / "vqgan.safetensors").keys() == {"newer"}


def test_training_goes_on_from_the_shipped_weights(tmp_path: Path) -> None:
    args = arguments(tmp_path, start=SHIPPED)
    unpack(SHIPPED, args.work)
    clip = {name: tensor.half() for name, tensor in load_file(args.work / "clip" / "clip.safetensors").items()}
    shipped = load_file(SHIPPED_CLIP)
    assert clip.keys() == shipped.keys() and all(torch.equal(clip[name], shipped[name]) for name in clip)
    starts = (("image", "clip/image"), ("text", "clip/text"), ("vqgan", "vqgan/vqgan"), ("gpt", "plain/gpt"))
    for part, name in starts:
        path = args.work / f"{name}.safetensors"
        assert path.is_file() and any(text.endswith(f"init={path}") for text in part_command(part, args, CPU))
    tower, heads = build_clip().visual, Heads(EMBED_DIM)
    init_tower(tower, heads, args.work / "clip" / "image.safetensors")


def test_image_tower_starts_from_the_shipped_clip(tmp_path: Path) -> None:
    assert f"init={SHIPPED_CLIP}" in part_command("image", arguments(tmp_path), CPU)
    tower, heads = build_clip().visual, Heads(EMBED_DIM)
    before = heads.heads[0].weight.clone()
    init_tower(tower, heads, SHIPPED_CLIP)
    shipped = load_file(SHIPPED_CLIP)
    assert all(torch.equal(tensor, shipped[f"visual.{name}"].to(tensor)) for name, tensor in tower.state_dict().items())
    assert torch.equal(heads.heads[0].weight, before)


def test_index_of_scenes_finds_a_scene_by_its_embedding(tiny_weights: Path, tmp_path: Path) -> None:
    weights, world = shutil.copytree(tiny_weights, tmp_path / "tiny"), scenes("100")
    add_scene_index(weights, world, {}, 30)
    pipe = ClipGen.from_pretrained(weights, dtype="float32")
    match = pipe.query_index(Image.fromarray(world.image(7)))
    assert match is not None and match.nearest[0][0].startswith("scene 7: ")
    assert match.captions[0] == describe(world.facts(7), random.Random(7))
    assert pipe.query_index("a lemon") is not None


def test_damaged_index_can_be_built_again_in_its_place(tiny_weights: Path, tmp_path: Path) -> None:
    weights, world = shutil.copytree(tiny_weights, tmp_path / "tiny"), scenes("100")
    path = add_scene_index(weights, world, {}, 30)
    path.write_bytes(b"damaged")
    with pytest.raises(WeightsError, match="coverage"):
        load_model_dir(weights)
    add_scene_index(weights, world, {}, 30)
    load_model_dir(weights)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder in which every object looks like one of four."""
    looks = sorted((RENDERS / "3d").glob("*.png"))
    codes = [thing.code for thing in read_objects().values()]
    codes += [a.source for a in ATTACHMENTS.values() if isinstance(a.source, str)]
    for style in ("3d", "flat"):
        folder = tmp_path / "data" / "renders" / style
        folder.mkdir(parents=True)
        for i, code in enumerate(codes):
            shutil.copy(RENDERS / style / looks[i % len(looks)].name, folder / f"{code}.png")
    return tmp_path / "data"


@pytest.mark.slow
def test_saved_image_tower_has_the_batch_statistics_of_its_averaged_weights(data: Path, tmp_path: Path) -> None:
    settings = ["steps=6", "batch_size=32", "held_out=16", "lr=0.003", "warmup=1", "ema=0.9", "precision=no"]
    line = [sys.executable, "-m", "train.mini.image_tower", "--data", str(data), "--out", str(tmp_path), *settings]
    run = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    tower = build_clip().visual
    tower.load_state_dict(load_file(tmp_path / "image.safetensors"))
    with torch.no_grad():
        pixels, _ = open_scenes(str(data)).batch(list(range(300, 364)))
        told = embed(tower.eval(), pixels)
        measured = embed(tower.train(), pixels)
    error = (told - measured).norm() / (measured - measured.mean(0)).norm()
    assert error < 0.6  # 0.3; with the statistics of the last step 1.4


@pytest.mark.slow
def test_recipe_at_a_tiny_budget_makes_weights_that_generate(data: Path, tmp_path: Path) -> None:
    wordnet = tmp_path / "wordnet"
    wordnet.mkdir()
    (wordnet / "data.noun").write_text("00000001 05 n 01 dog 0 000 | a pet\n")
    (wordnet / "index.noun").write_text("dog n 1 0 1 0 00000001\n")
    config = OmegaConf.load(CONFIG)
    config.model.vqgan.update({"ch": 32, "z_channels": 32})
    config.model.gpt.update({"n_layer": 1, "n_embd": 64})
    OmegaConf.save(config, tmp_path / "small.yaml")
    small = ["--config", str(tmp_path / "small.yaml")]
    small += [f"{part}.{name}" for part in ("image", "text") for name in ("steps=2", "batch_size=4", "held_out=4")]
    for stage in ("stage1", "stage2"):
        small += [f"{stage}.{name}" for name in ("steps=2", "batch_size=4", "held_out=4", "sample_every=9")]
    recipe = [sys.executable, "-m", "train.mini.recipe", "--data", str(data), "--work", str(tmp_path / "work")]
    recipe += ["--out", str(tmp_path / "weights"), "--wordnet", str(wordnet), *small, "index.scenes=20"]
    run = subprocess.run(recipe, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    generate = [
        sys.executable,
        "-m",
        "clipgen",
        "generate",
        "a lemon with hair",
        "--weights",
        str(tmp_path / "weights"),
    ]
    drawn = subprocess.run(
        [*generate, "--out", str(tmp_path / "out"), "--seed", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert drawn.returncode == 0, drawn.stderr
    assert list((tmp_path / "out").rglob("*.png"))
    carried = {path.name for path in (tmp_path / "work" / "weights").iterdir()}
    assert carried == {f"{name}.safetensors" for name in ("image", "heads", "text", "vqgan", "gpt")}
