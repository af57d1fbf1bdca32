"""Hundreds of hostile requests to Cog's real server: each is answered, and nothing is left behind.

A few dozen of them are in test_server.py.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from cog_server import CogServer
from hostile import Attack, Target, attack, url
from image_files import encoded
from local_server import serving
from PIL import Image

from clipgen.serving import KEPT_FOLDERS

GROWTH = 250
"""Megabytes by which the memory of a warm server may grow in a thousand requests.

Allocators keep memory from busy moments: over 6,000 requests it rises by up to 220 MB and falls again. A leak of 300 kB
per request would exceed the limit.
"""
COGS_FOLDERS = Path("/tmp/coglet/predictions")
pytestmark = pytest.mark.slow


@contextmanager
def attacked(weights: Path, folder: Path, schema: bool) -> Iterator[Target]:
    """A warm server in a folder of its own; fails afterwards if anything was left behind."""
    (folder / "tmp").mkdir()
    cog = CogServer(folder, schema, CLIPGEN_WEIGHTS=str(weights), TMPDIR=str(folder / "tmp"))
    with serving() as canary:
        target = Target(cog, folder, canary)
        try:
            assert cog.wait()["status"] == "READY", cog.log.read_text()
            yield target
            assert not canary.requests, "the server fetched from its own machine"
        finally:
            cog.stop()
            for name in (name for name in target.ids if name.startswith("pred_")):  # Cog leaves these
                assert not [path for path in (COGS_FOLDERS / name).rglob("*") if path.is_file()]
                shutil.rmtree(COGS_FOLDERS / name, ignore_errors=True)
    assert not list((folder / "tmp").glob("clipgen-*"))


@pytest.fixture(scope="module")
def bare(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A server without the input schema."""
    with attacked(tiny_weights, tmp_path_factory.mktemp("bare"), schema=False) as target:
        yield target


def large(target: Target) -> None:
    """Prompts of 10 MB, a value of that length in another input, and a file of 20 MB."""
    noise = base64.b64encode(bytes(range(256)) * 40_000).decode()
    for inputs in (
        {"prompt": "é " * 3_300_000},
        {"prompt": noise},
        {"output_format": noise},
        {"image": url(bytes(20 << 20))},
    ):
        inputs = {"prompt": "a", "candidates": 1} | inputs
        target.send(Attack(json.dumps({"input": inputs}).encode(), frozenset(inputs)))


def test_eight_images_of_64_megapixels_at_once_give_their_memory_back(bare: Target) -> None:
    # First: allocators keep some of the memory that many requests take.
    bomb = encoded(Image.new("RGBA", (8000, 8000)), "PNG")
    body = json.dumps({"input": {"image": url(bomb), "candidates": 1}}).encode()
    bare.send(Attack(body))
    memory = bare.cog.memory()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(bare.send, [Attack(body)] * 8))
    assert bare.answers["succeeded"] == 9
    assert bare.cog.memory() - memory < 500


def test_output_folders_are_private_and_only_the_latest_stay(bare: Target) -> None:
    for seed in range(40):
        bare.cog.predict(prompt="a", num_outputs=2, candidates=2, seed=seed)
    folders = list((bare.temporary / "tmp").glob("clipgen-*"))
    assert len(folders) == KEPT_FOLDERS
    for folder in folders:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert {path.name for path in folder.iterdir()} == {"1.png", "2.png"}


def test_a_thousand_hostile_requests_leave_nothing_behind(bare: Target) -> None:
    check_nothing_is_left(bare, 1000)


def test_hundreds_of_hostile_requests_with_an_input_schema_leave_nothing_behind(
    tiny_weights: Path, tmp_path: Path
) -> None:
    with attacked(tiny_weights, tmp_path, schema=True) as target:
        check_nothing_is_left(target, 500)


def check_nothing_is_left(target: Target, count: int) -> None:
    before, succeeded = target.draw(), target.answers["succeeded"]
    attack(target, 300)
    large(target)
    files, processes, memory = target.files(), target.cog.processes(), target.cog.memory()
    attack(target, count)
    large(target)
    grown = target.cog.memory() - memory
    print(f"\n{sum(target.answers.values())} answers {dict(target.answers)}, memory {memory:.0f} MB {grown:+.0f} MB")
    assert sum(target.answers.values()) >= count and target.answers["succeeded"] > succeeded + 20
    assert target.files() == files and target.cog.processes() == processes
    assert target.draw() == before
    assert grown < GROWTH
