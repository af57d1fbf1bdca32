"""Worker processes that read images: shared memory is checked first, and no wait for them is endless."""

from __future__ import annotations

import os
import signal
import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from clipgen.errors import ConfigError, DataError
from train.data.images import Batch, Images, Key
from train.loop import loader
from train.loop.stopping import Stop


class Troubled(Images):
    """Images whose worker hangs or is killed from image 6 on."""

    trouble = "hang"

    def __getitem__(self, key: Key) -> Batch:
        if key[0] >= 6:
            time.sleep(60) if self.trouble == "hang" else os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(key)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(12):
        Image.new("RGB", (20, 20), (20 * i, 0, 0)).save(tmp_path / f"{i:02d}.png")
    return tmp_path


def keys(step: int) -> list[Key]:
    return [(2 * step, 0), (2 * step + 1, 0)]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "POLL", 0.2)
    monkeypatch.setattr(loader, "MAX_WAIT", 1.0)


def test_finite_steps_give_the_same_batches_with_and_without_workers(folder: Path) -> None:
    by_workers = [list(loader.image_batches(Images(folder, 16), keys, range(1, 5), n)) for n in (0, 2)]
    assert [len(batches) for batches in by_workers] == [4, 4]
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(*by_workers, strict=True))
    assert list(loader.image_batches(Images(folder, 16), keys, range(0), 2)) == []


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("trouble", "message"), [("hang", "no batch came"), ("kill", "worker process .* died")])
def test_workers_that_hang_or_are_killed_end_training_with_one_line(
    folder: Path, trouble: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if trouble == "kill":
        monkeypatch.setattr(loader, "MAX_WAIT", 60.0)  # on a busy machine a worker's death takes a while to be seen
    data = Troubled(folder, 16)
    data.trouble = trouble
    batches = loader.image_batches(data, keys, count(), workers=1)
    with pytest.raises(DataError, match=message) as error:
        list(batches)  # those that a killed worker had ready are lost with it
    text = str(error.value)
    assert "workers=0" in text and "--shm-size" in text and "\n" not in text


@pytest.mark.parametrize("trouble", ["hang", "kill"])  # SIGTERM to a process group kills the workers, too
def test_stop_signal_ends_the_wait_for_workers_that_hang_or_died(
    trouble: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "POLL", 0.2)
    monkeypatch.setattr(loader, "GRACE", 0.4)
    with Stop() as stop:
        data = Troubled(folder, 16)
        data.trouble = trouble
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(list(loader.image_batches(data, keys, count(), workers=1, stop=stop))) <= 3
        with pytest.raises(SystemExit) as left:
            stop.leave_unsaved(folder)
    assert left.value.code == 143


def test_error_in_a_worker_gives_the_same_message_as_without_workers(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    messages = []
    for workers in (0, 1):
        with pytest.raises(DataError) as error:
            next(loader.image_batches(Images(tmp_path, 16), lambda step: [(0, 0)], count(), workers))
        messages.append(str(error.value))
    assert messages[0] == messages[1] and "\n" not in messages[0]


@pytest.mark.parametrize(
    ("size", "clip_size", "batch", "workers", "processes"), [(256, 224, 64, 2, 1), (96, 0, 8, 1, 4)]
)
def test_shared_memory_too_small_for_prefetched_batches_is_refused(
    size: int, clip_size: int, batch: int, workers: int, processes: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    needed = batch * 3 * 4 * (size**2 + clip_size**2) * workers * loader.PREFETCH * processes
    data = Images(folder, size, clip_size=clip_size)
    assert data.item_bytes == sum(t.nbytes for t in data[(0, 0)][:2])
    free = SimpleNamespace(free=needed)
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda path: free)
    loader.check_shared_memory(batch * data.item_bytes, workers)
    free.free -= 1
    with pytest.raises(ConfigError, match=rf"workers={workers} need .*workers=0.*--shm-size=\d+m"):
        loader.check_shared_memory(batch * data.item_bytes, workers)
    with pytest.raises(ConfigError, match="--shm-size"):
        next(loader.image_batches(data, lambda step: [(0, 0)] * batch, count(), workers))
    next(loader.image_batches(data, lambda step: [(0, 0)], count(), 0))  # needs none
