"""Memory: batches follow the free memory, and running out halves them without changing an image."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from clipgen import ClipGen
from clipgen.engine.batch import Batch
from clipgen.engine.engine import Engine
from clipgen.engine.image_decoder import ImageDecoder
from clipgen.errors import InsufficientMemoryError
from clipgen.models.kv_cache import KVCache
from clipgen.request import GenerationOutput, GenerationRequest
from clipgen.utils import memory
from clipgen.utils.memory import in_batches, max_batch_size, pixel_bytes, token_bytes
from train.config import load_config

CPU = torch.device("cpu")
COCO, IMAGENET = load_config("coco").model, load_config("imagenet").model


class SmallDevice(TorchDispatchMode):
    """An allocator whose largest free block has `largest` bytes: a larger tensor fails as on CUDA."""

    def __init__(self, largest: int) -> None:
        super().__init__()
        self.largest = largest

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view and out.nbytes > self.largest:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {out.nbytes} bytes.")
        return out


@pytest.fixture(scope="module")
def pipe(tiny_weights: Path) -> ClipGen:
    return ClipGen.from_pretrained(tiny_weights, device="cpu", dtype="float32")


@contextmanager
def small_engine(largest: int) -> Iterator[None]:
    """Limit the allocator in the steps of engines only."""
    round_ = Engine._round

    def limited(self: Engine) -> None:
        with SmallDevice(largest):
            round_(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_round", limited)
        yield


@contextmanager
def small_decoder(largest: int) -> Iterator[None]:
    """Limit the allocator in image decoders only."""
    run = ImageDecoder._run

    def limited(self: ImageDecoder, items: Sequence[Any]) -> Any:
        with SmallDevice(largest):
            return run(self, items)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageDecoder, "_run", limited)
        yield


def row_bytes(pipe: ClipGen) -> int:
    """Bytes of the keys and values of one row."""
    return KVCache.allocate(pipe.config.gpt, 1).data.nbytes


def same(a: GenerationOutput, b: GenerationOutput) -> bool:
    """Whether images are equal up to 1 of 255 levels, because another batch size rounds differently."""
    pairs = zip(a.images, b.images, strict=True)
    close = all(np.abs(np.asarray(x, int) - np.asarray(y, int)).max() <= 1 for x, y in pairs)
    return close and a.seeds == b.seeds and np.allclose(a.scores, b.scores, atol=1e-4)


def test_out_of_memory_halves_the_batch_with_a_warning_and_the_same_images(
    pipe: ClipGen, caplog: pytest.LogCaptureFixture
) -> None:
    expected = pipe("a lemon", num_outputs=4, candidates=8, seed=3)
    assert not caplog.records
    seen: list[tuple[int, int]] = []
    # Eight rows of the cache, which are four images with guidance, and 17 KB of activations in CLIP.
    with small_engine(9 * row_bytes(pipe)), small_decoder(60_000):
        result = pipe(
            "a lemon", num_outputs=4, candidates=8, seed=3, progress=lambda done, total: seen.append((done, total))
        )
    assert same(result, expected)
    assert [record.getMessage() for record in caplog.records] == [
        "decoding tokens: out of memory with 8 images at once; going on with 4",
        "decoding pixels: out of memory with 8 images at once; going on with 4",
        "decoding pixels: out of memory with 4 images at once; going on with 2",
    ]
    assert seen == [(done, 8 * 16) for done in range(4, 8 * 16 + 1, 4)]


def test_out_of_memory_changes_no_image_of_requests_that_share_a_call(pipe: ClipGen) -> None:
    requests = [
        GenerationRequest("a cat", num_outputs=3, seed=1),
        GenerationRequest("a dog", num_outputs=4, candidates=8, seed=9, guidance=1.0),
    ]
    expected = pipe.generate(requests)
    with small_engine(9 * row_bytes(pipe)), small_decoder(60_000):
        results = pipe.generate(requests)
    assert all(same(a, b) for a, b in zip(results, expected, strict=True))


def test_one_image_that_does_not_fit_is_refused_with_advice(pipe: ClipGen) -> None:
    match = r"not even one image fits .* smaller model"
    with small_engine(15_000), pytest.raises(InsufficientMemoryError, match=f"decoding tokens: {match}"):
        pipe("a lemon", candidates=4, seed=3)
    with small_decoder(15_000), pytest.raises(InsufficientMemoryError, match=f"decoding pixels: {match}"):
        pipe("a lemon", candidates=4, seed=3)
    assert pipe("a lemon", seed=3).images


LIMITED = """
import json, logging, resource, sys
from pathlib import Path
import torch
from clipgen import ClipGen
from clipgen.config import GPTConfig, ModelConfig, VQGANConfig
from clipgen.models.gpt import GPT
from clipgen.models.vqgan import VQGAN
from clipgen.weights.model_dir import load_model_dir

torch.set_num_threads(1)
torch.manual_seed(0)
clip = load_model_dir(sys.argv[1])[1]["clip"]
vqgan = VQGANConfig(image_size=32, patch=4, ch=32, ch_mult=[1], num_res_blocks=1, attn_resolutions=[], z_channels=32,
                    embed_dim=8, codebook_size=64)
gpt = GPTConfig(n_layer=16, n_head=4, n_embd=128, vocab_size=64, block_size=64, n_cond=32)
config = ModelConfig("wide", vqgan, gpt)
from clipgen.models.clip import Clip
pipe = ClipGen(config, Clip.from_state_dict(clip), GPT(config.gpt).eval(), VQGAN(config.vqgan).eval())
logging.basicConfig(format="%(message)s", stream=sys.stderr)

def draw():
    result = pipe("a lemon", num_outputs=2, candidates=64, seed=5)
    return [result.seeds, [image.tobytes().hex() for image in result.images]]

free = draw()
used = int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmSize")).split()[1])
resource.setrlimit(resource.RLIMIT_AS, (used * 1024 + 40 * 2**20,) * 2)  # 64 images' keys and values are 67 MB
print(json.dumps([free, draw()]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space by RLIMIT_AS")
def test_limited_address_space_changes_no_image(tiny_weights: Path, root: Path) -> None:
    command = [sys.executable, "-c", LIMITED, str(tiny_weights)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    free, limited = json.loads(done.stdout)
    assert "decoding tokens: out of memory with 64 images at once; going on with 32" in done.stderr
    assert free[0] == limited[0]
    for a, b in zip(free[1], limited[1], strict=True):
        levels = [np.frombuffer(bytes.fromhex(text), np.uint8).astype(int) for text in (a, b)]
        assert np.abs(levels[0] - levels[1]).max() <= 1


# --- batches ---


@settings(max_examples=40)  # each out of memory collects garbage
@given(count=st.integers(0, 40), size=st.integers(1, 50), room=st.integers(1, 50))
def test_in_batches_returns_every_item_once_in_order(count: int, size: int, room: int) -> None:
    sizes: list[int] = []

    def run(batch: Sequence[int]) -> list[int]:
        if len(batch) > room:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        sizes.append(len(batch))
        return list(batch)

    logging.disable(logging.WARNING)
    try:
        assert [item for batch in in_batches(run, range(count), size, "counting") for item in batch] == list(
            range(count)
        )
    finally:
        logging.disable(logging.NOTSET)
    assert max(sizes, default=0) <= min(size, room)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("MPS backend out of memory"),
        MemoryError(),
    ],
)
def test_allocation_errors_halve_the_batch(error: Exception) -> None:
    def run(batch: Sequence[int]) -> int:
        if len(batch) > 1:
            raise error
        return batch[0]

    assert list(in_batches(run, [1, 2, 3], 3, "testing")) == [1, 2, 3]


def test_other_errors_are_raised() -> None:
    def run(batch: Sequence[int]) -> int:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        list(in_batches(run, [1, 2], 2, "testing"))


# --- planning ---


def test_batch_size_follows_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, expected in [(0, 1), (99, 1), (1000, 8), (10**9, 64), (None, 64)]:
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        assert max_batch_size(100, CPU, 64) == expected


def test_pipeline_plans_batches_by_free_memory(pipe: ClipGen, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = pipe("a lemon", num_outputs=8, seed=3)
    batch_sizes: list[int] = []
    step = Batch.step
    monkeypatch.setattr(Batch, "step", lambda batch: batch_sizes.append(len(batch.sequences)) or step(batch))
    room = 3 * token_bytes(pipe.config.gpt, torch.float32, guided=True) / memory.HEADROOM + 1
    monkeypatch.setattr(memory, "free_bytes", lambda device: room)
    assert same(pipe("a lemon", num_outputs=8, seed=3), expected)
    assert batch_sizes == [3] * 16 + [3] * 16 + [2] * 16


def test_bytes_per_row_of_the_full_sizes() -> None:
    half = torch.float16
    assert token_bytes(COCO.gpt, half, guided=False) == pytest.approx(2 * 24 * 256 * 1024 * 2, rel=0.02)
    assert token_bytes(IMAGENET.gpt, half, guided=True) == pytest.approx(2 * 2 * 48 * 256 * 1600 * 2, rel=0.02)
    assert 80e6 < pixel_bytes(COCO.vqgan, half) < 200e6
    assert pixel_bytes(COCO.vqgan, torch.float32) > 1.9 * pixel_bytes(COCO.vqgan, half)


def test_free_memory_of_this_machine_is_positive_or_unknown() -> None:
    free = memory.free_bytes(CPU)
    assert free is None or 0 < free < 2**50


@pytest.mark.parametrize(
    ("limit", "stat", "expected"),
    [
        ("1000", "anon 300\ninactive_file 100\n", 700),
        ("1000", "anon 300\n", 600),
        ("300", "inactive_file 0\n", 0),
        ("max", "inactive_file 100\n", None),
        ("nonsense", "inactive_file 100\n", None),
    ],
)
def test_free_memory_respects_the_container_limit(tmp_path: Path, limit: str, stat: str, expected: int | None) -> None:
    for name, text in {"memory.max": limit, "memory.current": "400\n", "memory.stat": stat}.items():
        (tmp_path / name).write_text(text)
    assert memory._container_free(tmp_path, tmp_path / "none") == expected


@pytest.mark.parametrize(
    ("contents", "membership", "expected"),
    [
        (  # cgroup v1
            {
                "memory/memory.limit_in_bytes": "1000\n",
                "memory/memory.usage_in_bytes": "400\n",
                "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 100\n",
            },
            "4:memory:/\n",
            700,
        ),
        (  # a group within one that has the lower limit
            {
                **{"a/memory.max": "1000\n", "a/memory.current": "900\n", "a/memory.stat": "inactive_file 0\n"},
                **{"a/b/memory.max": "max\n", "a/b/memory.current": "500\n", "a/b/memory.stat": "anon 1\n"},
            },
            "0::/a/b\n",
            100,
        ),
    ],
)
def test_free_memory_respects_the_lowest_limit_of_all_cgroups(
    tmp_path: Path, contents: dict[str, str], membership: str, expected: int
) -> None:
    for name, text in contents.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "membership").write_text(membership)
    assert memory._container_free(tmp_path / "cgroup", tmp_path / "membership") == expected


def test_free_memory_without_a_container_has_no_limit(tmp_path: Path) -> None:
    assert memory._container_free(tmp_path, tmp_path / "none") is None
