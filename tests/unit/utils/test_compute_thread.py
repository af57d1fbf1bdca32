"""The thread that computes for a pipeline."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path

import pytest
import torch

from clipgen import ClipGen
from clipgen.utils.compute_thread import ComputeThread, synchronize

NAME: ContextVar[str] = ContextVar("NAME", default="nobody")


def test_work_runs_on_one_thread_in_the_context_of_its_caller() -> None:
    worker = ComputeThread()

    def work(asked: str) -> tuple[str, str, int, bool]:
        return asked, NAME.get(), threading.get_ident(), torch.is_inference_mode_enabled()

    def ask(name: str) -> tuple[str, str, int, bool]:
        NAME.set(name)
        return worker.run(work, name)

    with ThreadPoolExecutor(4) as callers:
        found = list(callers.map(ask, map(str, range(20))))
    assert all(asked == name and inference for asked, name, _, inference in found)
    assert len({thread for _, _, thread, _ in found}) == 1 and found[0][2] != threading.get_ident()
    assert worker.run(lambda: worker.run(threading.get_ident)) == found[0][2]
    assert not torch.is_inference_mode_enabled()


def test_compute_thread_has_the_number_of_threads_of_its_creator() -> None:
    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert ComputeThread().run(torch.get_num_threads) == count
    finally:
        torch.set_num_threads(before)


def test_error_is_raised_in_the_caller() -> None:
    worker = ComputeThread()
    with pytest.raises(ZeroDivisionError):
        worker.run(lambda: 1 // 0)
    assert worker.run(sum, [1, 2]) == 3


def test_pipeline_computes_only_on_its_thread(tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computing on another thread would give OpenMP a second set of threads."""
    threads: set[int] = set()

    def note(module: torch.nn.Module, *_: object) -> None:
        threads.add(threading.get_ident())

    hook = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        pipe = ClipGen.from_pretrained(tiny_weights, device="cpu")
        with ThreadPoolExecutor(3) as callers:
            list(callers.map(lambda seed: pipe("a lemon", num_outputs=2, seed=seed), range(6)))
        pipe.query_index("a lemon")
        pipe.image_decoder.preview(torch.zeros(1, pipe.config.gpt.block_size, dtype=torch.long))
    finally:
        hook.remove()
    assert threads == {pipe.compute.run(threading.get_ident)}


def test_synchronize_waits_for_its_gpu_and_ignores_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited.append(device))
    synchronize(torch.device("cpu"))
    synchronize(torch.device("cuda:1"))
    assert waited == [torch.device("cuda:1")]
