"""The cache of published files: checked on arrival and on use, fetched once, refused when changed; the catalog."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from local_server import Answer, Server, serving, wait_until

from clipgen.errors import DownloadError
from clipgen.utils.download import RetryPolicy
from clipgen.weights import cache as module
from clipgen.weights.cache import Settings, expected_fingerprint, fetch, file_state, find_model
from clipgen.weights.catalog import CATALOG, File, PretrainedModel

HASTY = RetryPolicy(timeout=5, attempts=3, backoff=0.001)


def checkpoint(seed: int = 0, size: int = 200_000) -> bytes:
    """Bytes that look like a PyTorch checkpoint: a ZIP archive."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("model/data", random.Random(seed).randbytes(size))
    return archive.getvalue()


CONTENT, OTHER = checkpoint(0), checkpoint(1)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        server.put("/gpt.pt", CONTENT)
        yield server


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(cache=tmp_path / "cache")


def entry(server: Server, sha256: bytes | None = None, size: int | None = None) -> PretrainedModel:
    """An entry with one file; `sha256` is the content whose hash its publisher states."""
    stated = hashlib.sha256(sha256).hexdigest() if sha256 else None
    return PretrainedModel("toy", "", "", "", (File("gpt.pt", "gpt", f"{server.address}/gpt.pt", size, stated),))


def left(settings: Settings) -> set[str]:
    """Files in the cache except for the lock."""
    return {path.name for path in settings.cache.rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_file_is_fetched_once_and_verified_at_every_use(server: Server, settings: Settings) -> None:
    toy = entry(server, sha256=CONTENT, size=len(CONTENT))
    assert file_state(toy, toy.files[0], settings) == "absent"
    for _ in range(2):
        assert fetch(toy, settings, HASTY) == {"gpt": settings.cache / "toy" / "gpt.pt"}
    path = settings.path(toy, toy.files[0])
    assert path.read_bytes() == CONTENT and len(server.requests) == 1 and left(settings) == {"gpt.pt"}
    assert file_state(toy, toy.files[0], settings) == "present"


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"X" + data[1:], lambda data: b""])
@pytest.mark.parametrize("stated", [True, False])
def test_damaged_file_is_fetched_again(server: Server, settings: Settings, damage, stated: bool) -> None:
    toy = entry(server, sha256=CONTENT if stated else None)
    path = fetch(toy, settings, HASTY)["gpt"]
    path.write_bytes(damage(CONTENT))
    told: list[str] = []
    fetch(toy, settings, HASTY, log=told.append)
    assert path.read_bytes() == CONTENT and "fetching it again" in told[0] and str(path) in told[0]


def test_bytes_with_another_hash_are_refused_and_removed(server: Server, settings: Settings) -> None:
    toy = entry(server, sha256=OTHER)
    with pytest.raises(DownloadError) as refused:
        fetch(toy, settings, HASTY)
    message = str(refused.value)
    assert hashlib.sha256(CONTENT).hexdigest() in message and hashlib.sha256(OTHER).hexdigest() in message
    assert toy.files[0].url in message and str(settings.path(toy, toy.files[0])) in message
    assert left(settings) == set()


def test_parts_of_two_versions_are_discarded_and_fetched_again_once(server: Server, settings: Settings) -> None:
    """A server without validators changes the file meanwhile; the stated hash detects it, and the download restarts."""
    server.etag, server.answers = None, [Answer(cut=1000)]
    server.put("/gpt.pt", OTHER)
    toy = entry(server, sha256=CONTENT)
    with pytest.raises(DownloadError):
        fetch(toy, settings, RetryPolicy(attempts=1))
    assert (
        left(settings) == {"gpt.pt.part", "gpt.pt.part.json"} and file_state(toy, toy.files[0], settings) == "partial"
    )
    server.put("/gpt.pt", CONTENT)
    assert fetch(toy, settings, HASTY)["gpt"].read_bytes() == CONTENT
    assert server.ranges_asked() == [None, "bytes=1000-", None] and left(settings) == {"gpt.pt"}


def test_first_download_is_recorded_where_no_hash_is_stated(server: Server, settings: Settings) -> None:
    toy, told = entry(server), []
    path = fetch(toy, settings, HASTY, log=told.append)["gpt"]
    record = path.with_name("gpt.pt.json")
    notes = json.loads(record.read_text())
    assert notes == {"size": len(CONTENT), "sha256": hashlib.sha256(CONTENT).hexdigest(), "url": toy.files[0].url}
    assert any("recorded" in line and notes["sha256"] in line for line in told)
    assert expected_fingerprint(toy.files[0], path) == (notes["size"], notes["sha256"])
    assert fetch(toy, settings, HASTY)["gpt"] == path and len(server.requests) == 1

    path.unlink()
    server.put("/gpt.pt", OTHER)  # of the same size
    assert len(OTHER) == len(CONTENT)
    with pytest.raises(DownloadError, match=r"not what the first download was.* delete .*gpt\.pt\.json"):
        fetch(toy, settings, HASTY)
    assert left(settings) == {"gpt.pt.json"} and json.loads(record.read_text()) == notes

    record.unlink()
    assert fetch(toy, settings, HASTY)["gpt"].read_bytes() == OTHER


def test_unreadable_record_is_refused(server: Server, settings: Settings) -> None:
    record = fetch(entry(server), settings, HASTY)["gpt"].with_name("gpt.pt.json")
    for text in ("", "[1]", '{"size": 5}', "[" * 100_000):
        record.write_text(text)
        with pytest.raises(DownloadError, match=r"gpt\.pt\.json, the record of the first download, cannot be read"):
            fetch(entry(server), settings, HASTY)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (CONTENT[:-30], "is a checkpoint without its end"),
        (b"", "is not a PyTorch checkpoint"),
        (b"<html>Log in first", "is not a PyTorch checkpoint"),
    ],
)
def test_truncated_or_foreign_file_is_not_recorded(
    server: Server, settings: Settings, content: bytes, problem: str
) -> None:
    """A server sends less than the whole file with a matching length."""
    server.put("/gpt.pt", content)
    with pytest.raises(DownloadError, match=problem):
        fetch(entry(server), settings, HASTY)
    assert left(settings) == set()
    server.put("/gpt.pt", b"\x80\x02" + CONTENT)  # what PyTorch wrote before 1.6
    fetch(entry(server), settings, HASTY)


def test_mirrors_are_asked_in_order_instead_of_the_publisher(server: Server, settings: Settings) -> None:
    server.put("/b/toy/gpt.pt", CONTENT)
    mirrored = dataclasses.replace(settings, mirrors=(f"{server.address}/a", f"{server.address}/b"))
    assert fetch(entry(server, sha256=CONTENT), mirrored, HASTY)["gpt"].read_bytes() == CONTENT
    assert [path for path, _ in server.requests] == ["/a/toy/gpt.pt", "/b/toy/gpt.pt"]


def test_mirror_with_wrong_bytes_is_skipped(server: Server, settings: Settings) -> None:
    server.put("/a/toy/gpt.pt", OTHER)
    server.put("/b/toy/gpt.pt", CONTENT)
    mirrored = dataclasses.replace(settings, mirrors=(f"{server.address}/a", f"{server.address}/b"))
    told: list[str] = []
    assert fetch(entry(server, sha256=CONTENT), mirrored, HASTY, log=told.append)["gpt"].read_bytes() == CONTENT
    assert "/a/toy/gpt.pt" in told[0] and "SHA-256" in told[0]


@pytest.mark.parametrize("status", [403, 404, 500])
def test_refused_download_names_mirror_and_manual_remedy(server: Server, settings: Settings, status: int) -> None:
    server.default = Answer(status=status)
    toy = entry(server, sha256=CONTENT)
    with pytest.raises(DownloadError, match=rf"answered {status} .*Set CLIPGEN_MIRROR .* put it at .*/toy/gpt\.pt"):
        fetch(toy, settings, HASTY)
    assert left(settings) == set()


def test_offline_uses_the_cache_and_contacts_no_server(server: Server, settings: Settings) -> None:
    offline, toy = dataclasses.replace(settings, offline=True), entry(server)
    path = settings.path(toy, toy.files[0])
    with pytest.raises(DownloadError, match=r"gpt\.pt: not in the cache, and CLIPGEN_OFFLINE is set") as refused:
        fetch(toy, offline, HASTY)
    assert toy.files[0].url in str(refused.value) and f"put it at {path}" in str(refused.value)
    assert not settings.cache.exists()

    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)  # by hand, as it says
    assert fetch(toy, offline, HASTY) == {"gpt": path}
    assert json.loads(path.with_name("gpt.pt.json").read_text())["sha256"] == hashlib.sha256(CONTENT).hexdigest()

    path.write_bytes(OTHER)
    with pytest.raises(DownloadError, match="CLIPGEN_OFFLINE is set"):
        fetch(toy, offline, HASTY)
    assert path.read_bytes() == OTHER and not server.requests


def test_verified_file_in_a_read_only_cache_needs_no_lock(
    server: Server, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a read-only cache works."""
    path = fetch(entry(server), settings, HASTY)["gpt"]

    def refuse(*_: object) -> None:
        raise AssertionError("a lock was taken")

    monkeypatch.setattr(module, "FileLock", refuse)
    assert fetch(entry(server), settings, HASTY)["gpt"] == path


def test_cache_that_cannot_be_created_is_named(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match=r"cannot be used: Not a directory; CLIPGEN_CACHE names another"):
        fetch(entry(server), Settings(tmp_path / "file" / "cache"), HASTY)


SCRIPT = """
import sys
from pathlib import Path
from clipgen.weights.catalog import File, PretrainedModel
from clipgen.weights.cache import Settings, fetch
url, cache, sha256 = sys.argv[1:]
toy = PretrainedModel("toy", "", "", "", (File("gpt.pt", "gpt", url, None, sha256 or None),))
print(fetch(toy, Settings(Path(cache)), log=lambda message: print(message, file=sys.stderr))["gpt"], flush=True)
"""


def start(server: Server, settings: Settings, sha256: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, f"{server.address}/gpt.pt", str(settings.cache), sha256]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_one_of_several_processes_fetches_and_the_others_wait(server: Server, settings: Settings) -> None:
    server.default = Answer(pace=0.05, piece=100)  # 100 s, unless told to hurry
    first = start(server, settings)
    wait_until(lambda: len(server.requests) == 1)
    others = [start(server, settings) for _ in range(2)]
    told = [process.stderr.readline() for process in others if process.stderr]
    server.default.hurry.set()
    results = [process.communicate(timeout=600) for process in (first, *others)]
    path = settings.cache / "toy" / "gpt.pt"
    assert [out for out, _ in results] == [f"{path}\n"] * 3, results
    assert len(server.requests) == 1 and path.read_bytes() == CONTENT
    assert told == ["another process is fetching gpt.pt; waiting for it\n"] * 2


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_download_of_a_killed_process_is_resumed_by_the_next(server: Server, settings: Settings, how: int) -> None:
    server.default = Answer(pace=0.05, piece=1000)  # 10 s
    part = settings.cache / "toy" / "gpt.pt.part"
    process = start(server, settings)
    wait_until(lambda: part.exists() and part.stat().st_size >= 8000)
    os.kill(process.pid, how)
    process.communicate(timeout=600)
    assert left(settings) == {"gpt.pt.part", "gpt.pt.part.json"}
    arrived = part.stat().st_size
    server.default = Answer()
    assert fetch(entry(server), settings, HASTY)["gpt"].read_bytes() == CONTENT
    assert server.ranges_asked() == [None, f"bytes={arrived}-"]


def test_file_names_are_never_taken_from_the_server(server: Server, settings: Settings) -> None:
    server.default = Answer(headers={"Content-Disposition": 'attachment; filename="../../evil.pt"'})
    fetch(entry(server, sha256=CONTENT), settings, HASTY)
    assert left(settings) == {"gpt.pt"}


def test_settings_come_from_the_environment() -> None:
    assert Settings.from_environment({}) == Settings(Path.home() / ".cache" / "clipgen", (), False)
    environ = {
        "CLIPGEN_CACHE": "/c",
        "CLIPGEN_MIRROR": "http://a.example/x/, https://b.example:8",
        "CLIPGEN_OFFLINE": "1",
    }
    assert Settings.from_environment(environ) == Settings(
        Path("/c"), ("http://a.example/x", "https://b.example:8"), True
    )
    assert not Settings.from_environment({"CLIPGEN_OFFLINE": "0"}).offline


@pytest.mark.parametrize(
    "mirror",
    [
        "ftp://a.example",
        "file:///etc",
        "a.example",
        "http://",
        "http://u:p@a.example",
        "http://a.example/?x",
        "http://[::",
        "http://a.example:99999",
        "http://ä.example",
        "http://a b",
        "http://a.example/\x01",
    ],
)
def test_malformed_mirror_is_refused(mirror: str) -> None:
    with pytest.raises(DownloadError, match=r"CLIPGEN_MIRROR .* is not a mirror: give http"):
        Settings.from_environment({"CLIPGEN_MIRROR": mirror})


@given(st.text() | st.text(alphabet="htps:/[]@?#%.a0 ,").map("http://".__add__))
def test_every_accepted_mirror_is_a_plain_http_address(text: str) -> None:
    try:
        mirrors = Settings.from_environment({"CLIPGEN_MIRROR": text}).mirrors
    except DownloadError:
        return
    for mirror in mirrors:
        parts = urlsplit(mirror)
        assert parts.scheme in ("http", "https") and parts.hostname and not parts.query and parts.username is None
        assert mirror.isascii() and mirror.isprintable() and " " not in mirror


def test_catalog_entries_are_consistent() -> None:
    for name, item in CATALOG.items():
        assert name == item.name and re.fullmatch(r"[a-z0-9-]+", name)
        parts = [file.part for file in item.files]
        assert len(set(parts)) == len(parts) and set(parts) <= {"clip", "vqgan", "gpt", "inception", "vgg16"}
        assert not item.config or set(parts) == {"clip", "vqgan", "gpt"}
        for file in item.files:
            assert re.fullmatch(r"[A-Za-z0-9][\w.-]+", file.name) and urlsplit(file.url).scheme == "https"
            assert file.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", file.sha256)
    with pytest.raises(DownloadError, match="there is no 'cocoa' to fetch; there is coco, openai-vit-b32"):
        find_model("cocoa")


def test_openai_hash_equals_the_one_in_its_package() -> None:
    import clip.clip

    (file,) = CATALOG["openai-vit-b32"].files
    assert clip.clip._MODELS["ViT-B/32"] == file.url and file.url.split("/")[-2] == file.sha256


def test_evaluation_networks_have_the_addresses_and_hashes_of_their_libraries() -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    from torchvision.models import VGG16_Weights

    for name, url in (("inception", URL_INCEPTION_V3), ("vgg16", VGG16_Weights.IMAGENET1K_V1.url)):
        (file,) = CATALOG[name].files
        assert file.url == url and file.name == url.rsplit("/", 1)[1]
        assert file.sha256 and url.removesuffix(".pth").endswith(f"-{file.sha256[:8]}")  # torch.hub's convention
