"""ClipGen: a prompt or an image, or a mix of them, becomes pictures, best first.

pipe = ClipGen.from_pretrained("weights/mini")
result = pipe("a lemon", num_outputs=4, candidates=16, guidance=3.0, seed=7)
result.images[0].save("lemon.png")
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clipgen.config import ModelConfig
from clipgen.engine.batch import Picture
from clipgen.engine.engine import Engine
from clipgen.engine.image_decoder import DecodedImage, ImageDecoder
from clipgen.errors import ConfigError, RequestError
from clipgen.images.pixels import from_pixels, to_clip, to_pixels, to_rgb
from clipgen.models.clip import Clip, tokenize
from clipgen.models.gpt import GPT, condition_of
from clipgen.models.vqgan import VQGAN
from clipgen.request import MAX_SEED, GenerationOutput, GenerationRequest, Prompt, SamplingParams, parts_of
from clipgen.utils.compute_thread import ComputeThread
from clipgen.weights.model_dir import build_module, load_model_dir
from clipgen.weights.precision import pick_device, pick_precision
from clipgen.weights.training_index import IndexMatch, TrainingIndex

WAVE = 8
"""Candidates that are drawn and ranked before a request with a budget is asked whether it wants more."""


class ClipGen:
    """The three models and how they work together, for any number of threads at once."""

    def __init__(
        self,
        config: ModelConfig,
        clip: Clip,
        gpt: GPT,
        vqgan: VQGAN,
        coverage: TrainingIndex | None = None,
        worker: ComputeThread | None = None,
    ) -> None:
        if clip.embed_dim != config.gpt.n_cond:
            raise ConfigError(f"CLIP embeds in {clip.embed_dim} dimensions, the GPT expects {config.gpt.n_cond}")
        self.config = config
        self.clip, self.gpt, self.vqgan = clip, gpt, vqgan
        self.coverage = coverage
        self.worker = worker or ComputeThread()
        self.engine = Engine(gpt, worker=self.worker)
        self.image_decoder = ImageDecoder(vqgan, clip, self.worker)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | None = None, dtype: str | None = None) -> ClipGen:
        """Load a folder of weights.

        Args:
            folder: config.yaml, clip.safetensors, vqgan.safetensors, gpt.safetensors, manifest.json.
            device: "cpu", "cuda", "cuda:1"; the GPU by default where there is one.
            dtype: "float32", "bfloat16", "float16", "int8" (`pick_precision`); by default the fastest that is safe.

        Raises:
            WeightsError: something is missing, damaged or does not fit.
            ConfigError: the folder's configuration cannot work.
            RequestError: no such device or dtype.
        """
        worker = ComputeThread()
        return worker.run(cls._load, folder, device, dtype, worker)

    @classmethod
    def _load(cls, folder: str | Path, device: str | None, dtype: str | None, worker: ComputeThread) -> ClipGen:
        place = pick_device(device)
        precision = pick_precision(dtype, place)
        config, parts = load_model_dir(folder)
        # Each file is unmapped once its network has been built: what was read of it no longer counts as this process'.
        clip = Clip.from_state_dict(parts.pop("clip"), place, precision.compute)
        gpt = precision.build_gpt(config.gpt, parts.pop("gpt"), place)
        vqgan = build_module(VQGAN, config.vqgan, parts.pop("vqgan"), place, precision.compute).prepack()
        return cls(config, clip, gpt, vqgan, TrainingIndex.load(folder), worker)

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.clip.device

    @property
    def dtype(self) -> torch.dtype:
        """In what CLIP and the VQGAN compute."""
        return self.vqgan.post_quant_conv.weight.dtype

    @property
    def precision(self) -> str:
        """The GPT's: one of `PRECISIONS`."""
        return self.gpt.quantised or str(self.gpt.head.weight.dtype).removeprefix("torch.")

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
        keep: Image.Image | None = None,
        keep_rows: int = 0,
        target_score: float | None = None,
        seconds: float | None = None,
        negative: Prompt | None = None,
        progress: Callable[[int, int], None] | None = None,
        is_cancelled: Callable[[], bool] | None = None,
    ) -> GenerationOutput:
        """Generate images of one prompt; see `GenerationRequest` for the arguments and `generate` for the errors."""
        request = GenerationRequest(
            *(prompt, num_outputs, candidates, guidance, temperature, top_k, top_p, seed),
            *(keep, keep_rows, target_score, seconds, negative),
        )
        return self.generate([request], progress, is_cancelled)[0]

    def embed(self, prompt: Prompt) -> Tensor:
        """The prompt's point on the unit sphere, (D,) float32: the weighted sum of its parts, normalised.

        Candidates are ranked by it.

        Raises:
            RequestError: it is empty, or its parts cancel each other out.
        """
        return self._placed(prompt)[0]

    def condition(self, prompt: Prompt) -> Tensor:
        """What the GPT draws from, (n_things * D,) float32: as `embed`, but where there is an index of the training
        pictures, each text takes the place of the pictures it is about (`TrainingIndex.project`).

        The GPT was trained on pictures' embeddings, and a sentence's are elsewhere. Only a text that is all of the
        prompt can be about several things; what is mixed becomes one.
        """
        return self._placed(prompt)[1]

    def _placed(self, prompt: Prompt, field: str = "prompt") -> tuple[Tensor, Tensor]:
        """`embed` and `condition`, of one pass through CLIP; `field` is whose prompt it is."""
        return self.worker.run(self._place, prompt, field)

    def covered(self, prompt: Prompt) -> IndexMatch | None:
        """How near a prompt is to the training pictures; None where the weights have no index of them."""
        if self.coverage is None:
            return None
        embedding = self.embed(prompt)
        parts = [(isinstance(part, str), abs(weight)) for part, weight in parts_of(prompt)]
        texts = sum(weight for is_text, weight in parts if is_text) / sum(weight for _, weight in parts)
        return self.worker.run(self.coverage.look, embedding, texts)

    def _place(self, prompt: Prompt, field: str) -> tuple[Tensor, Tensor]:
        parts = parts_of(prompt, field)
        things = self.config.gpt.n_things if len(parts) == 1 else 1
        embedding = torch.zeros(self.clip.embed_dim, device=self.device)
        condition = torch.zeros(things, self.clip.embed_dim, device=self.device)
        for part, weight in parts:
            if isinstance(part, str):
                seen = self.clip.encode_text([part])
                drawn = seen if self.coverage is None else self.coverage.project(seen[0], things)
            else:
                seen = drawn = self.clip.encode_image(to_clip([to_rgb(part)], self.clip.image_size))
            embedding += weight * seen[0]
            condition[: len(drawn)] += weight * drawn
        if min(embedding.norm(), condition[0].norm()) < 1e-4:
            raise RequestError(field, "has parts that cancel each other out; change their weights")
        condition = condition_of(F.normalize(condition, dim=1)[None], self.config.gpt)
        return F.normalize(embedding, dim=0), condition[0]

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        progress: Callable[[int, int], None] | None = None,
        is_cancelled: Callable[[], bool] | None = None,
        preview: Callable[[list[Image.Image]], None] | None = None,
        previews: int = 4,
    ) -> list[GenerationOutput]:
        """Draw several requests together; each gives the same pictures as alone, whatever other threads draw.

        Args:
            progress: called with (tokens done, tokens in all) over all requests. It must be quick, everyone waits.
            is_cancelled: asked before each token, and before each batch of pictures is painted; likewise.
            preview: called with the first `num_outputs` candidates of each request, as far as they are drawn, the rest
                grey. CLIP may pick others in the end.
            previews: how often at most, from 1 to the rows of tokens less one.

        Raises:
            RequestError: a prompt cannot be embedded, or more rows are to be kept than there are.
            Cancelled: `is_cancelled` said so.
            UnavailableError, UnavailableError, EngineError, InsufficientMemoryError: see `Engine.draw`.
        """
        seconds: dict[str, float] = {}
        start = time.perf_counter()
        with self._timed(seconds, "embed"):
            works = self.worker.run(lambda: [self._work(request) for request in requests])
        length, done = self.config.gpt.block_size, 0
        total = length * sum(request.drawn for request in requests)
        while drawing := [(work, seed) for work in works for seed in work.wave(start)]:
            pictures = [work.picture(seed) for work, seed in drawing]
            report = None if progress is None else _offset(progress, done, total)
            with self._timed(seconds, "decode_tokens"):
                watch = None if preview is None else self._watch(preview, drawing)
                every = self.config.vqgan.grid * -(-self.config.vqgan.grid // (max(previews, 1) + 1))
                drawn = self.engine.draw(pictures, report, is_cancelled, watch, every)
            seconds["queue"] = seconds.get("queue", 0.0) + drawn.waited
            seconds["decode_tokens"] -= drawn.waited
            conditions = torch.stack([work.embedding for work, _ in drawing])
            painted = self.image_decoder.paint(drawn.tokens, conditions, is_cancelled)
            for stage, spent in zip(
                ("decode_pixels", "rank"), zip(*(p.seconds for p in painted), strict=True), strict=True
            ):
                seconds[stage] = seconds.get(stage, 0.0) + sum(spent)
            for (work, seed), picture in zip(drawing, painted, strict=True):
                work.found.append((seed, picture))
            done += length * len(drawing)
        if progress is not None and done < total:  # a budget ended it early
            progress(total, total)
        seconds["total"] = time.perf_counter() - start
        return self.worker.run(lambda: [self._best(work, seconds) for work in works])

    def close(self, seconds: float | None = None) -> tuple[int, int]:
        """Draw nothing more; see `Engine.close`."""
        return self.engine.close(seconds)

    def _work(self, request: GenerationRequest) -> _Work:
        seed = secrets.randbelow(MAX_SEED) if request.seed is None else request.seed
        sampling = request.sampling(self.config.sampling)
        negative = None if request.negative is None else self._place(request.negative, "negative")[1]
        embedding, condition = self._place(request.prompt, "prompt")
        return _Work(request, seed, embedding, condition, negative, sampling, self._kept(request))

    def _kept(self, request: GenerationRequest) -> Tensor | None:
        """The tokens of the rows that a request keeps."""
        if request.keep is None:
            return None
        config = self.config.vqgan
        if request.keep_rows >= config.grid:
            raise RequestError(
                "keep_rows",
                f"is {request.keep_rows}; this model draws {config.grid} rows, so keep 1 to {config.grid - 1}",
            )
        pixels = to_pixels([to_rgb(request.keep)], config.image_size).to(self.device, self.dtype)
        return self.vqgan.encode_tokens(pixels)[0, : request.keep_rows * config.grid]

    def _watch(
        self, preview: Callable[[list[Image.Image]], None], drawing: Sequence[tuple[_Work, int]]
    ) -> Callable[[Tensor], None]:
        shown = [i for i, (work, seed) in enumerate(drawing) if seed - work.seed < work.request.num_outputs]

        def watch(tokens: Tensor) -> None:
            if shown and bool((tokens[shown] < 0).any()):
                preview(self.image_decoder.preview(tokens[shown]))

        return watch

    def _best(self, work: _Work, seconds: dict[str, float]) -> GenerationOutput:
        best = work.best()
        negative = [] if work.request.negative is None else parts_of(work.request.negative)
        texts = [part for part, _ in parts_of(work.request.prompt) + negative if isinstance(part, str)]
        _, dropped = tokenize(texts, self.clip.context_length)
        return GenerationOutput(
            images=from_pixels(torch.stack([picture.pixels for _, picture in best])),
            scores=[picture.score for _, picture in best],
            seeds=[seed for seed, _ in best],
            seed=work.seed,
            request=work.request,
            dropped=" ".join(filter(None, dropped)),
            seconds=dict(seconds),
            drawn=len(work.found),
        )

    @contextmanager
    def _timed(self, seconds: dict[str, float], stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass(eq=False)
class _Work:
    """One request on its way."""

    request: GenerationRequest
    seed: int
    embedding: Tensor  # (D,), for the ranking
    condition: Tensor  # (n_things * D,), for the GPT
    negative: Tensor | None  # (D,), likewise
    sampling: SamplingParams
    kept: Tensor | None
    found: list[tuple[int, DecodedImage]] = field(default_factory=list)  # by seed

    def picture(self, seed: int) -> Picture:
        """One of its candidates, for the engine."""
        return Picture(self.condition, seed, self.sampling, self.kept, self.negative)

    def wave(self, start: float) -> range:
        """The seeds to draw next: all at once without a budget, else a few, until it is used up or met."""
        request, have = self.request, len(self.found)
        if request.target_score is None and request.seconds is None:
            return range(self.seed + have, self.seed + request.drawn)
        if have and (self._met() or self._late(start)):
            return range(0)
        size = max(WAVE, request.num_outputs)
        return range(self.seed + have, self.seed + min(have + size, request.drawn))

    def best(self) -> list[tuple[int, DecodedImage]]:
        """The best so far, as many as are asked for."""
        return sorted(self.found, key=lambda found: -found[1].score)[: self.request.num_outputs]

    def _met(self) -> bool:
        target = self.request.target_score
        return target is not None and self.best()[-1][1].score >= target

    def _late(self, start: float) -> bool:
        return self.request.seconds is not None and time.perf_counter() - start >= self.request.seconds


def _offset(progress: Callable[[int, int], None], before: int, total: int) -> Callable[[int, int], None]:
    """Progress of one wave as progress of the whole."""
    return lambda done, _: progress(before + done, total)
