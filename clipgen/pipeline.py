"""ClipGen: a prompt or an image, or a mix of them, becomes pictures, best first.

pipe = ClipGen.from_pretrained("weights/mini")
result = pipe("a lemon", num_outputs=4, candidates=16, guidance=3.0, seed=7)
result.images[0].save("lemon.png")
"""

from __future__ import annotations

import dataclasses
import math
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clipgen.clip import Clip, tokenize
from clipgen.config import ConfigError, ModelConfig, SamplingConfig
from clipgen.gpt import GPT
from clipgen.images import clip_from_pixels, from_pixels, to_clip, to_rgb
from clipgen.sampling import generate_tokens
from clipgen.vqgan import VQGAN
from clipgen.weights import build, load_weights

Part = str | Image.Image
Prompt = Part | Sequence[Part] | Sequence[tuple[Part, float]]
"""Text, an image, several of either, or several with weights; a negative weight moves away from its part."""

MAX_SEED = 2**31 - 1
MAX_CANDIDATES = 1024
MAX_PARTS = 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class RequestError(ValueError):
    """A request that cannot be served; the message names the field, its value and what is allowed."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}")
        self.field = field


@dataclass(frozen=True)
class Request:
    """What to draw and how, checked when built. None stands for the model's own default.

    Raises:
        RequestError: a value is out of its range.
    """

    prompt: Prompt
    num_outputs: int = 1
    candidates: int | None = None
    """Pictures to draw before CLIP picks the best `num_outputs`; None draws just those."""
    guidance: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    """Candidate i uses seed + i; None draws one, which the result tells."""

    def __post_init__(self) -> None:
        _check_whole("num_outputs", self.num_outputs, 1, MAX_CANDIDATES)
        if self.candidates is not None:
            _check_whole("candidates", self.candidates, 1, MAX_CANDIDATES)
            if self.candidates < self.num_outputs:
                raise RequestError(
                    "candidates", f"is {self.candidates}; it must be at least num_outputs, {self.num_outputs}"
                )
        _check_number("guidance", self.guidance, 0, 30)
        _check_number("temperature", self.temperature, 0, 10)
        _check_number("top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise RequestError("top_p", "is 0; it must be above 0 and at most 1")
        if self.top_k is not None:
            _check_whole("top_k", self.top_k, 0, 2**31 - 1)
        if self.seed is not None:
            _check_whole("seed", self.seed, 0, MAX_SEED)
        _parts(self.prompt)

    @property
    def drawn(self) -> int:
        """Candidates to draw."""
        return self.candidates or self.num_outputs

    def sampling(self, default: SamplingConfig) -> SamplingConfig:
        """This request's sampling, with the model's defaults where it does not say."""
        names = ("temperature", "top_k", "top_p", "guidance")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(default, **given)


@dataclass(frozen=True)
class Result:
    """Pictures of one request, best first."""

    images: list[Image.Image]
    scores: list[float]
    """Cosine of each picture's CLIP embedding and the prompt's."""
    seeds: list[int]
    """Of each picture: the same request with this seed and one candidate draws it again."""
    seed: int
    request: Request
    dropped: str
    """The end of the prompt that did not fit into CLIP's context; "" when everything did."""
    seconds: dict[str, float]
    """By stage; requests of one call share their stages, so they share these."""


def _check_whole(field: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(field, f"is {value!r}; it must be a whole number from {low} to {high}")


def _check_number(field: str, value: float | None, low: float, high: float) -> None:
    if value is None:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        raise RequestError(field, f"is {value!r}; it must be a number from {low:g} to {high:g}")


def _parts(prompt: Prompt) -> list[tuple[Part, float]]:
    """A prompt as weighted parts; refuses empty ones."""
    raw = [prompt] if isinstance(prompt, (str, Image.Image)) else list(prompt)
    parts = [part if isinstance(part, tuple) else (part, 1.0) for part in raw]
    if not 1 <= len(parts) <= MAX_PARTS:
        raise RequestError("prompt", f"has {len(parts)} parts; give 1 to {MAX_PARTS}")
    for part, weight in parts:
        if isinstance(part, str) and not part.strip():
            raise RequestError("prompt", "is empty; write what to draw, or give an image")
        if not isinstance(part, (str, Image.Image)):
            raise RequestError("prompt", f"has a part of type {type(part).__name__}; give text or a PIL image")
        _check_number("prompt weight", weight, -100, 100)
    return parts


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
    """The asked precision, or the fastest that is safe: see design in the README.

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
        clip = Clip.from_state_dict(parts["clip"], place, precision)
        gpt = build(GPT, config.gpt, parts["gpt"], place, precision)
        vqgan = build(VQGAN, config.vqgan, parts["vqgan"], place, precision)
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
        for part, weight in _parts(prompt):
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
            should_stop: asked before each token.

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
        batches = self._batches(rows, [r.sampling(self.config.sampling) for r in requests])
        pixels: dict[_Row, Tensor] = {}
        scores: dict[_Row, float] = {}
        for number, (sampling, batch) in enumerate(batches):
            condition = torch.stack([embeddings[row.request] for row in batch])
            report = _rescaled(progress, number, len(batches))
            with self._timed(seconds, "decode_tokens"):
                tokens = generate_tokens(
                    self.gpt, condition, [row.seed for row in batch], sampling, report, should_stop
                )
            with self._timed(seconds, "decode_pixels"):
                images = self.vqgan.decode_tokens(tokens).float().clamp(-1, 1)
            with self._timed(seconds, "rank"):
                found = self.clip.encode_image(clip_from_pixels(images, self.clip.image_size))
                scores |= dict(zip(batch, (found * condition).sum(-1).tolist(), strict=True))
            pixels |= dict(zip(batch, images.cpu(), strict=True))
        seconds["total"] = time.perf_counter() - start
        return [
            self._best(request, [row for row in rows if row.request == i], seeds[i], pixels, scores, seconds)
            for i, request in enumerate(requests)
        ]

    def _batches(self, rows: list[_Row], samplings: list[SamplingConfig]) -> list[tuple[SamplingConfig, list[_Row]]]:
        """Rows that sample alike, in batches that fit."""
        groups: dict[tuple, list[_Row]] = {}
        for row in rows:
            groups.setdefault(dataclasses.astuple(samplings[row.request]), []).append(row)
        batches = []
        for group in groups.values():
            sampling = samplings[group[0].request]
            batches += [(sampling, group[i : i + BATCH]) for i in range(0, len(group), BATCH)]
        return batches

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
        texts = [part for part, _ in _parts(request.prompt) if isinstance(part, str)]
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
    def _timed(self, seconds: dict[str, float], stage: str):
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


BATCH = 64
"""Pictures decoded at once; with guidance twice as many rows."""


@dataclass(frozen=True)
class _Row:
    """One candidate: which request it belongs to, and its seed."""

    request: int
    seed: int


def _rescaled(
    progress: Callable[[int, int], None] | None, number: int, count: int
) -> Callable[[int, int], None] | None:
    """Progress over all batches from the progress of one."""
    if progress is None:
        return None
    return lambda done, total: progress(number * total + done, count * total)
