"""ClipGen: a prompt or an image, or a mix of them, becomes pictures, best first.

pipe = ClipGen.from_pretrained("weights/mini")
result = pipe("a lemon", num_outputs=4, candidates=16, guidance=3.0, seed=7)
result.images[0].save("lemon.png")
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgen.clip import Clip, tokenize
from clipgen.config import ConfigError, ModelConfig, SamplingConfig
from clipgen.gpt import GPT
from clipgen.images import clip_from_pixels, from_pixels, to_clip, to_rgb
from clipgen.memory import MOST_PICTURES, MOST_ROWS, fitting, in_batches, pixel_bytes, token_bytes
from clipgen.request import MAX_SEED, Prompt, Request, RequestError, Result, parts_of
from clipgen.sampling import Cancelled, generate_tokens
from clipgen.vqgan import VQGAN
from clipgen.weights import DTYPES, build, load_weights


def pick_device(device: str | None) -> torch.device:
    """The asked device, or the GPU where there is one, else the CPU.

    Raises:
        RequestError: no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RequestError("device", f"is {device!r}, which cannot be used here ({reason}); try cpu") from error


def pick_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """The asked precision, or the fastest that is safe.

    bf16 where the hardware has it (Ampere GPUs on, CPUs with AVX512-BF16 or AMX), fp16 on older GPUs, else fp32.

    Raises:
        RequestError: an unknown name, or float16 on a CPU, which is hundreds of times slower than float32.
    """
    if dtype is not None and dtype not in DTYPES:
        raise RequestError("dtype", f"is {dtype!r}; use one of {', '.join(DTYPES)}")
    if dtype == "float16" and device.type == "cpu":
        raise RequestError("dtype", "is 'float16', which CPUs have no arithmetic for; use bfloat16 or float32")
    if dtype is not None:
        return DTYPES[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    has_bf16 = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


class ClipGen:
    """The three models and how they work together."""

    def __init__(self, config: ModelConfig, clip: Clip, gpt: GPT, vqgan: VQGAN) -> None:
        if clip.embed_dim != config.gpt.n_cond:
            raise ConfigError(f"CLIP embeds in {clip.embed_dim} dimensions, the GPT expects {config.gpt.n_cond}")
        self.config = config
        self.clip, self.gpt, self.vqgan = clip, gpt, vqgan

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | None = None, dtype: str | None = None) -> ClipGen:
        """Load a folder of weights.

        Args:
            folder: config.yaml, clip.safetensors, vqgan.safetensors, gpt.safetensors, manifest.json.
            device: "cpu", "cuda", "cuda:1"; the GPU by default where there is one.
            dtype: "float32", "bfloat16", "float16"; by default what is fastest on the device.

        Raises:
            WeightsError: something is missing, damaged or does not fit.
            ConfigError: the folder's configuration cannot work.
            RequestError: no such device or dtype.
        """
        place = pick_device(device)
        precision = pick_dtype(dtype, place)
        config, parts = load_weights(folder)
        # Each file is unmapped once its network has been built: what was read of it no longer counts as this process'.
        clip = Clip.from_state_dict(parts.pop("clip"), place, precision)
        gpt = build(GPT, config.gpt, parts.pop("gpt"), place, precision)
        vqgan = build(VQGAN, config.vqgan, parts.pop("vqgan"), place, precision)
        return cls(config, clip, gpt, vqgan)

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.clip.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the GPT and the VQGAN."""
        return self.gpt.head.weight.dtype

    def __call__(
        self,
        prompt: Prompt,
        *,
        num_outputs: int = 1,
        candidates: int | None = None,
        guidance: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Result:
        """Draw pictures of one prompt; `Request` describes the arguments, `generate` the callbacks and errors."""
        request = Request(prompt, num_outputs, candidates, guidance, temperature, top_k, top_p, seed)
        return self.generate([request], progress, should_stop)[0]

    @torch.inference_mode()
    def embed(self, prompt: Prompt) -> Tensor:
        """The prompt's point on the unit sphere, (D,) float32: the weighted sum of its parts, normalised.

        Raises:
            RequestError: it is empty, or its parts cancel each other out.
        """
        total = torch.zeros(self.clip.embed_dim, device=self.device)
        for part, weight in parts_of(prompt):
            if isinstance(part, str):
                embedding = self.clip.encode_text([part])[0]
            else:
                embedding = self.clip.encode_image(to_clip([to_rgb(part)], self.clip.image_size))[0]
            total += weight * embedding
        if total.norm() < 1e-4:
            raise RequestError("prompt", "has parts that cancel each other out; change their weights")
        return F.normalize(total, dim=0)

    @torch.inference_mode()
    def generate(
        self,
        requests: Sequence[Request],
        progress: Callable[[int, int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[Result]:
        """Draw several requests together; each gives the same pictures as alone.

        Args:
            progress: called with (tokens done, tokens in all) over all requests.
            should_stop: asked before each token, and before each batch of pictures is painted.

        Raises:
            RequestError: a prompt cannot be embedded.
            Cancelled: `should_stop` said so.
        """
        seconds: dict[str, float] = {}
        start = time.perf_counter()
        seeds = [secrets.randbelow(MAX_SEED) if r.seed is None else r.seed for r in requests]
        with self._timed(seconds, "embed"):
            embeddings = [self.embed(r.prompt) for r in requests]
        rows = [_Row(i, seeds[i] + n) for i, r in enumerate(requests) for n in range(r.drawn)]
        report = _Counter(progress, len(rows))
        pixels: dict[_Row, Tensor] = {}
        scores: dict[_Row, float] = {}
        for sampling, group in self._groups(rows, [r.sampling(self.config.sampling) for r in requests]):
            conditions = {row: embeddings[row.request] for row in group}
            drawn = self._draw(sampling, conditions, seconds, report, should_stop)
            for row, image, score in self._paint(drawn, conditions, seconds, should_stop):
                pixels[row], scores[row] = image, score
        seconds["total"] = time.perf_counter() - start
        return [
            self._best(request, [row for row in rows if row.request == i], seeds[i], pixels, scores, seconds)
            for i, request in enumerate(requests)
        ]

    def _groups(self, rows: list[_Row], samplings: list[SamplingConfig]) -> Iterator[tuple[SamplingConfig, list[_Row]]]:
        """Rows that sample alike: they can be decoded together."""
        groups: dict[tuple, list[_Row]] = {}
        for row in rows:
            groups.setdefault(dataclasses.astuple(samplings[row.request]), []).append(row)
        for group in groups.values():
            yield samplings[group[0].request], group

    def _draw(
        self,
        sampling: SamplingConfig,
        conditions: dict[_Row, Tensor],
        seconds: dict[str, float],
        report: _Counter,
        should_stop: Callable[[], bool] | None,
    ) -> dict[_Row, Tensor]:
        """The tokens (T,) of each row, in batches that fit."""

        def run(batch: Sequence[_Row]) -> Tensor:
            condition = torch.stack([conditions[row] for row in batch])
            batch_seeds = [row.seed for row in batch]
            with self._timed(seconds, "decode_tokens"):
                return generate_tokens(
                    self.gpt, condition, batch_seeds, sampling, report.of_batch(len(batch)), should_stop
                )

        tokens: list[Tensor] = []
        size = fitting(token_bytes(self.config.gpt, self.dtype, sampling.guidance != 1), self.device, MOST_ROWS)
        for output in in_batches(run, list(conditions), size, "decoding tokens"):
            tokens.extend(output)
            report.finish(len(output))
        return dict(zip(conditions, tokens, strict=True))

    def _paint(
        self,
        tokens: dict[_Row, Tensor],
        conditions: dict[_Row, Tensor],
        seconds: dict[str, float],
        should_stop: Callable[[], bool] | None,
    ) -> Iterator[tuple[_Row, Tensor, float]]:
        """Each row with its pixels (3, H, W) in [-1, 1] on the CPU and its CLIP cosine, in batches that fit."""

        def run(batch: Sequence[_Row]) -> list[tuple[_Row, Tensor, float]]:
            if should_stop is not None and should_stop():
                raise Cancelled
            with self._timed(seconds, "decode_pixels"):
                images = self.vqgan.decode_tokens(torch.stack([tokens[row] for row in batch])).float().clamp(-1, 1)
            with self._timed(seconds, "rank"):
                found = self.clip.encode_image(clip_from_pixels(images, self.clip.image_size))
                cosines = (found * torch.stack([conditions[row] for row in batch])).sum(-1).tolist()
            return list(zip(batch, images.cpu(), cosines, strict=True))

        size = fitting(pixel_bytes(self.config.vqgan, self.dtype), self.device, MOST_PICTURES)
        for painted in in_batches(run, list(tokens), size, "decoding pixels"):
            yield from painted

    def _best(
        self,
        request: Request,
        rows: list[_Row],
        seed: int,
        pixels: dict[_Row, Tensor],
        scores: dict[_Row, float],
        seconds: dict[str, float],
    ) -> Result:
        best = sorted(rows, key=lambda row: -scores[row])[: request.num_outputs]
        texts = [part for part, _ in parts_of(request.prompt) if isinstance(part, str)]
        _, dropped = tokenize(texts, self.clip.context_length)
        return Result(
            images=from_pixels(torch.stack([pixels[row] for row in best])),
            scores=[scores[row] for row in best],
            seeds=[row.seed for row in best],
            seed=seed,
            request=request,
            dropped=" ".join(filter(None, dropped)),
            seconds=dict(seconds),
        )

    @contextmanager
    def _timed(self, seconds: dict[str, float], stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class _Row:
    """One candidate: which request it belongs to, and its seed."""

    request: int
    seed: int


class _Counter:
    """Progress over all pictures from the progress of one batch."""

    def __init__(self, progress: Callable[[int, int], None] | None, pictures: int) -> None:
        self.progress, self.pictures, self.done = progress, pictures, 0

    def of_batch(self, size: int) -> Callable[[int, int], None] | None:
        """A callback for a batch of `size` pictures."""
        progress = self.progress
        if progress is None:
            return None
        return lambda done, total: progress(self.done * total + done * size, self.pictures * total)

    def finish(self, size: int) -> None:
        """A batch is complete."""
        self.done += size
