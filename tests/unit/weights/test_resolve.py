"""Finding a model folder: by path, by name, by default, and fetched when only published."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from local_server import Server, serving
from published import Source

from clipgen import ClipGen
from clipgen.errors import ClipGenError, ConfigError, OutputError, WeightsError
from clipgen.weights import resolve
from clipgen.weights.catalog import CATALOG, File, PretrainedModel
from clipgen.weights.model_dir import FILES, MANIFEST, copy_model_dir
from clipgen.weights.resolve import find_default, resolve_weights


@pytest.fixture(autouse=True)
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the models beside the code, empty; the working folder is another, CLIPGEN_WEIGHTS is not set."""
    monkeypatch.setattr(resolve, "SHIPPED", tmp_path / "shipped")
    monkeypatch.delenv("CLIPGEN_WEIGHTS", raising=False)
    monkeypatch.setenv("CLIPGEN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "shipped").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "shipped"


@pytest.fixture
def mini(shipped: Path, tiny_weights: Path) -> Path:
    return copy_model_dir(tiny_weights, shipped / "mini")


@pytest.fixture
def coco(shipped: Path, tiny_weights: Path) -> Path:
    return copy_model_dir(tiny_weights, shipped / "coco")


# --- names and folders ---


def test_existing_folder_is_returned_as_given(tmp_path: Path) -> None:
    assert resolve_weights(tmp_path) == tmp_path
    assert resolve_weights(f"  {tmp_path}/ ") == tmp_path
    assert resolve_weights(".") == Path(".")


def test_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_weights("~/here") == tmp_path / "here" == resolve_weights(Path("~/here"))
    with pytest.raises(ConfigError, match="has no home folder"):
        resolve_weights("~nosuchuser/here")


def test_name_resolves_to_the_model_beside_the_code(mini: Path, coco: Path) -> None:
    assert (resolve_weights("mini"), resolve_weights("coco")) == (mini, coco)


def test_folder_wins_over_a_model_of_the_same_name(mini: Path) -> None:
    Path("mini").mkdir()
    assert resolve_weights("mini") == Path("mini")


@pytest.mark.parametrize("name", ["nowhere", "weights/nowhere", "openai-vit-b32", "../shipped/nothing", "user/repo"])
def test_unknown_name_is_refused_with_the_names_there_are(mini: Path, name: str) -> None:
    with pytest.raises(WeightsError, match=rf"no weights in {name}: no such folder, .* there is coco, mini$"):
        resolve_weights(name)


# --- the default ---


def test_environment_names_the_model_where_none_is_given(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPGEN_WEIGHTS", str(tmp_path / "here"))
    assert resolve_weights() == resolve_weights("") == tmp_path / "here"
    assert resolve_weights("mini") == mini
    monkeypatch.setenv("CLIPGEN_WEIGHTS", " ")
    assert resolve_weights() == mini


def test_larger_model_beside_the_mini_model_is_the_default(mini: Path, coco: Path) -> None:
    assert resolve_weights() == coco
    assert find_default() == (coco, f"it is the largest model in {coco.parent}")


def test_mini_model_alone_is_the_default(mini: Path) -> None:
    folder, reason = find_default()
    assert folder == mini and "the only model" in reason and "weights fetch coco" in reason


def test_incomplete_larger_model_is_passed_over_and_named(mini: Path, coco: Path) -> None:
    (coco / MANIFEST).unlink()
    folder, reason = find_default()
    assert folder == mini and reason == f"{coco} is incomplete: it has no {MANIFEST}"


def test_no_model_beside_the_code_is_refused(shipped: Path) -> None:
    with pytest.raises(WeightsError, match=r"no weights in .*shipped; name a model folder with --weights"):
        resolve_weights()


def test_model_that_ships_with_the_code_is_found_by_name(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert resolve_weights("mini") == root / "weights" / "mini"


# --- published models ---


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving() as server:
        monkeypatch.setenv("CLIPGEN_MIRROR", server.address)
        yield server


def test_published_model_is_fetched_and_converted_once(
    hfailab: Source, mirror: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {"clip": hfailab.clip, "vqgan": hfailab.vqgan, "gpt": hfailab.gpt}
    for path in paths.values():
        mirror.put(f"/tiny/{path.name}", path.read_bytes())
    files = tuple(File(path.name, part, "https://nowhere.invalid/x") for part, path in paths.items())
    monkeypatch.setitem(CATALOG, "tiny", PretrainedModel("tiny", "", "", "", files, config=hfailab.config))
    lines: list[str] = []
    done: dict[str, tuple[int, int | None]] = {}
    report = lambda file, size, total: done.update({file.name: (size, total)})  # noqa: E731
    folder = resolve_weights("tiny", lines.append, report)
    assert done == {path.name: (path.stat().st_size,) * 2 for path in paths.values()}
    assert folder == tmp_path / "cache" / "models" / "tiny" and any("converting tiny" in line for line in lines)
    assert ClipGen.from_pretrained(folder, device="cpu").config.name == "tiny"
    asked = len(mirror.requests)
    assert resolve_weights("tiny", lines.append) == folder and len(mirror.requests) == asked == 3
    lines.clear()
    (folder / "gpt.safetensors").write_bytes(b"cut off")  # as by a disk that was full
    assert resolve_weights("tiny", lines.append) == folder and lines == [f"converting tiny into {folder}"]
    assert ClipGen.from_pretrained(folder, device="cpu").config.name == "tiny"


def test_published_model_that_is_not_in_the_cache_is_refused_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPGEN_OFFLINE", "1")
    with pytest.raises(ClipGenError, match=r"gpt_coco\.pt.*CLIPGEN_OFFLINE is set"):
        resolve_weights("coco")


# --- the pipeline ---


def test_pipeline_loads_the_resolved_model(mini: Path, coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(mini.parent))
    assert ClipGen.from_pretrained(device="cpu").folder == coco
    assert (
        ClipGen.from_pretrained("mini", device="cpu").folder == ClipGen.from_pretrained("~/mini", "cpu").folder == mini
    )


def test_saved_pipeline_loads_again_with_its_card(mini: Path, tmp_path: Path) -> None:
    (mini / "README.md").write_text("the card")
    (mini / "notes.txt").write_text("not part of the model")
    pipe = ClipGen.from_pretrained("mini", device="cpu", dtype="float32")
    saved = pipe.save_pretrained(tmp_path / "deep" / "copy")
    assert saved == tmp_path / "deep" / "copy"
    assert {file.name for file in saved.iterdir()} == {*FILES, MANIFEST, "README.md"}
    again = ClipGen.from_pretrained(saved, device="cpu", dtype="float32")
    images = [each("a lemon", seed=1, candidates=1).images[0].tobytes() for each in (pipe, again)]
    assert images[0] == images[1]
    assert pipe.save_pretrained(mini) == mini, "saving in place changes nothing"


def test_saving_refuses_changed_weights_and_an_unwritable_folder(mini: Path, tmp_path: Path) -> None:
    pipe = ClipGen.from_pretrained("mini", device="cpu", dtype="float32")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/out cannot be written: Not a directory"):
        pipe.save_pretrained(tmp_path / "file" / "out")
    with (mini / "gpt.safetensors").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(WeightsError, match=r"gpt\.safetensors has 100 bytes"):
        pipe.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
