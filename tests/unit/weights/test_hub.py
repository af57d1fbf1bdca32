"""Models from the Hub: the real client against a local server that speaks the Hub's paths."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub, serving_hub

from clipgen import ClipGen
from clipgen.errors import ConfigError, DownloadError, WeightsError
from clipgen.weights.model_dir import FILES, MANIFEST
from clipgen.weights.resolve import resolve_weights


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_TOKEN", "CLIPGEN_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLIPGEN_CACHE", str(tmp_path / "cache"))
    with serving_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        yield hub


@pytest.fixture
def model(tiny_weights: Path, tmp_path: Path) -> Path:
    """A model folder to publish, with files that must not be fetched."""
    folder = Path(shutil.copytree(tiny_weights, tmp_path / "model"))
    for name in ("README.md", "evil.py", "pytorch_model.bin", "extra.safetensors"):
        (folder / name).write_text("not to be fetched")
    return folder


def test_model_is_loaded_from_a_repository(hub: Hub, model: Path, tmp_path: Path) -> None:
    commit = hub.publish(model)
    lines: list[str] = []
    folder = resolve_weights("hf://someone/lemons", lines.append)
    assert lines == [f"fetching hf://someone/lemons (commit {commit[:10]})"]
    assert folder.is_relative_to(tmp_path / "cache" / "hub") and folder.name == commit
    assert ClipGen.from_pretrained("hf://someone/lemons", device="cpu").config.name == "tiny"


def test_only_the_files_of_a_model_folder_are_fetched_each_once(hub: Hub, model: Path) -> None:
    hub.publish(model)
    for _ in range(2):
        folder = resolve_weights("hf://someone/lemons")
    assert sorted(hub.fetched()) == sorted([MANIFEST, *FILES]) == sorted(path.name for path in folder.iterdir())


def test_manifest_cannot_name_other_files(hub: Hub, model: Path) -> None:
    manifest = json.loads((model / MANIFEST).read_text())
    for name in ("../../escape.safetensors", "/etc/passwd", "evil.py"):
        manifest["files"][name] = {"size": 1, "sha256": "0"}
    (model / MANIFEST).write_text(json.dumps(manifest))
    hub.publish(model)
    resolve_weights("hf://someone/lemons")
    assert sorted(hub.fetched()) == sorted([MANIFEST, *FILES])


def test_revision_is_a_branch_or_a_commit_and_main_by_default(hub: Hub, model: Path) -> None:
    first = hub.publish(model, branch="v1.0")
    config = (model / "config.yaml").read_text()
    ClipGen.from_pretrained(model, device="cpu").save_pretrained(model)
    (model / "README.md").write_text("a new card, another commit")
    second = hub.publish(model)
    assert first != second and config
    assert resolve_weights("hf://someone/lemons").name == second
    assert resolve_weights("hf://someone/lemons@main").name == second
    assert resolve_weights("hf://someone/lemons@v1.0").name == first
    assert resolve_weights(f"hf://someone/lemons@{first}").name == first


def test_fetched_model_is_used_without_a_connection(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.publish(model)
    folder = resolve_weights("hf://someone/lemons")
    monkeypatch.setenv("CLIPGEN_OFFLINE", "1")
    asked = len(hub.requests)
    assert resolve_weights("hf://someone/lemons") == folder and len(hub.requests) == asked
    with pytest.raises(DownloadError, match=r"hf://someone/other: manifest\.json is not in the cache, and CLIPGEN_OFF"):
        resolve_weights("hf://someone/other")
    monkeypatch.delenv("CLIPGEN_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    assert resolve_weights("hf://someone/lemons") == folder
    with pytest.raises(DownloadError, match=r"not in the cache, and the Hub cannot be reached"):
        resolve_weights("hf://someone/other")


@pytest.mark.parametrize("damage", [lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data[:-10]])
def test_file_that_differs_from_its_manifest_is_refused(hub: Hub, model: Path, damage) -> None:
    (model / "gpt.safetensors").write_bytes(damage((model / "gpt.safetensors").read_bytes()))
    hub.publish(model)
    with pytest.raises(WeightsError, match=r"gpt\.safetensors (is damaged or was changed|has [\d,]+ bytes)"):
        resolve_weights("hf://someone/lemons")


def test_repository_without_a_model_folder_is_refused(hub: Hub, model: Path) -> None:
    (model / MANIFEST).unlink()
    hub.publish(model)
    with pytest.raises(WeightsError, match=r"hf://someone/lemons has no manifest\.json: it is not a clipgen model"):
        resolve_weights("hf://someone/lemons")
    assert hub.fetched() == []


def test_unknown_repository_and_revision_are_named(hub: Hub, model: Path) -> None:
    hub.publish(model)
    with pytest.raises(DownloadError, match=r"^hf://no/such: no such repository, or it is private or gated"):
        resolve_weights("hf://no/such")
    with pytest.raises(DownloadError, match=r"^hf://someone/lemons@v9: the repository has no branch, tag or commit"):
        resolve_weights("hf://someone/lemons@v9")


def test_private_repository_needs_a_token(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.publish(model)
    hub.private = "hf_secret"
    with pytest.raises(DownloadError, match="private or gated"):
        resolve_weights("hf://someone/lemons")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert (resolve_weights("hf://someone/lemons") / MANIFEST).is_file()


def test_hub_cache_of_the_environment_is_shared(
    hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish(model)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert resolve_weights("hf://someone/lemons").is_relative_to(tmp_path / "home" / "hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "shared"))
    assert resolve_weights("hf://someone/lemons").is_relative_to(tmp_path / "shared")


@pytest.mark.parametrize(
    "address",
    ["hf://", "hf://lemons", "hf://a/b/c", "hf://../../etc", "hf://a/b@", "hf://a/b@v1 x", "hf://a/b?x", "hf://ä/b"],
)
def test_malformed_address_is_refused(hub: Hub, address: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a model on the Hub; write hf://user/repo"):
        resolve_weights(address)
    assert not hub.requests


def test_user_and_repo_without_hf_prefix_is_a_folder(hub: Hub, model: Path) -> None:
    hub.publish(model)
    with pytest.raises(WeightsError, match="no weights in someone/lemons: no such folder"):
        resolve_weights("someone/lemons")
    assert not hub.requests


def test_missing_client_is_named_with_the_extra(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DownloadError, match=r"needs the package huggingface_hub: pip install 'clipgen\[hub\]'"):
        resolve_weights("hf://someone/lemons")


def test_damaged_file_in_the_cache_is_fetched_again(hub: Hub, model: Path) -> None:
    hub.publish(model)
    weights = resolve_weights("hf://someone/lemons") / "gpt.safetensors"
    whole = weights.read_bytes()
    weights.resolve().write_bytes(whole[:-10])
    lines: list[str] = []
    folder = resolve_weights("hf://someone/lemons", lines.append)
    assert (folder / "gpt.safetensors").read_bytes() == whole
    assert "gpt.safetensors has" in lines[0] and "fetched again" in lines[0]


def test_connection_that_breaks_off_is_one_line(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.publish(model)
    hub.cut = 10
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's attempts
    with pytest.raises(DownloadError, match=r"hf://someone/lemons: manifest\.json"):
        resolve_weights("hf://someone/lemons")
