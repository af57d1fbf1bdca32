"""ClipGen: a prompt, an image or a mix of them becomes images, best first.

pipe = ClipGen.from_pretrained("weights/mini")
output = pipe("a lemon", num_outputs=4, candidates=16, guidance=3.0, seed=7)
output.images[0].save("lemon.png")
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clipgen.config import ModelConfig
from clipgen.engine.engine import Engine
from clipgen.engine.image_decoder import ImageDecoder
from clipgen.errors import ConfigError, RequestError, WeightsError
from clipgen.images.pixels import from_pixels, to_clip, to_pixels
from clipgen.job import Job, preview_interval, previewer
from clipgen.models.clip import Clip
from clipgen.models.gpt import GPT
from clipgen.models.vqgan import VQGAN
from clipgen.outputs.metadata import receipts, weights_digest
from clipgen.request import GenerationOutput, GenerationRequest, Prompt, new_seed, parts_of
from clipgen.utils.compute_thread import ComputeThread, synchronize
from clipgen.utils.text import expand_home
from clipgen.weights.model_dir import build_module, copy_model_dir, load_model_dir
from clipgen.weights.precision import pick_device, pick_precision
from clipgen.weights.resolve import resolve_weights
from clipgen.weights.training_index import IndexMatch, TrainingIndex

log = logging.getLogger(__name__)


class ClipGen:
    """Text-to-image pipeline of CLIP, GPT and VQGAN. Thread-safe.

    Args:
        index: the training images, to tell how far a prompt is from them.
        digest: SHA-256 of the folder of weights, for receipts; without it there are none.

    Raises:
        ConfigError: CLIP's embeddings are not what the GPT is conditioned on.
    """

    def __init__(
        self,
        config: ModelConfig,
        clip: Clip,
        gpt: GPT,
        vqgan: VQGAN,
        index: TrainingIndex | None = None,
        digest: str = "",
        compute: ComputeThread | None = None,
    ) -> None:
        if clip.embed_dim != config.gpt.n_cond:
            raise ConfigError(f"CLIP embeds in {clip.embed_dim} dimensions, the GPT expects {config.gpt.n_cond}")
        self.config = config
        self.clip, self.gpt, self.vqgan = clip, gpt, vqgan
        self.index, self.digest = index, digest
        self.folder: Path | None = None  # that it was loaded from
        self.compute = compute or ComputeThread()
        self.engine = Engine(gpt, compute=self.compute)
        self.image_decoder = ImageDecoder(vqgan, clip, self.compute)

    @classmethod
    def from_pretrained(
        cls, weights: str | Path | None = None, device: str | None = None, dtype: str | None = None
    ) -> ClipGen:
        """Load a model.

        Args:
            weights: a model folder, a name ("mini", "coco") or "hf://user/repo"; by default $CLIPGEN_WEIGHTS, else the
                best model beside the code (`resolve_weights`).
            device: "cpu", "cuda", "cuda:1"; by default the GPU where there is one.
            dtype: "float32", "bfloat16", "float16", "int8" (`pick_precision`); by default the fastest that is safe.

        Raises:
            WeightsError: no such model, or something in it is missing, damaged or does not fit.
            DownloadError: it is to be fetched and cannot be.
            ConfigError: the folder's configuration cannot work.
            RequestError: no such device or dtype.
        """
        folder = resolve_weights(weights, log.info)
        compute = ComputeThread()
        pipe = compute.run(cls._load, folder, device, dtype, compute)
        pipe.folder = folder
        return pipe

    def save_pretrained(self, folder: str | Path) -> Path:
        """Copy the model folder that this pipeline was loaded from, with its model card; other files in `folder` stay.

        Raises:
            WeightsError: the pipeline was not loaded from a folder, or its files have changed since.
            OutputError: `folder` cannot be written.
        """
        if self.folder is None:
            raise WeightsError("this pipeline was not loaded from a model folder; write one with `save_model_dir`")
        return copy_model_dir(self.folder, expand_home(folder))

    @classmethod
    def _load(cls, folder: str | Path, device: str | None, dtype: str | None, compute: ComputeThread) -> ClipGen:
        place = pick_device(device)
        precision = pick_precision(dtype, place)
        config, parts = load_model_dir(folder)
        # Each file is unmapped once its network is built: what was read of it no longer counts as this process's.
        clip = Clip.from_state_dict(parts.pop("clip"), place, precision.compute)
        gpt = precision.build_gpt(config.gpt, parts.pop("gpt"), place)
        vqgan = build_module(VQGAN, config.vqgan, parts.pop("vqgan"), place, precision.compute).prepack()
        index = TrainingIndex.load(folder)
        if index is not None and index.embed_dim != clip.embed_dim:
            raise WeightsError(f"the index in {folder} is of embeddings of {index.embed_dim} numbers, not this CLIP's")
        return cls(config, clip, gpt, vqgan, index, weights_digest(folder), compute)

    @property
    def device(self) -> torch.device:
        """Device of the models."""
        return self.clip.device

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of CLIP and the VQGAN."""
        return self.vqgan.post_quant_conv.weight.dtype

    @property
    def precision(self) -> str:
        """Precision of the GPT's large weights, one of `PRECISIONS`."""
        return self.gpt.quantised or str(self.gpt.head.weight.dtype).removeprefix("torch.")

    @property
    def is_healthy(self) -> bool:
        """Whether requests can succeed: False after the compute thread or the GPU died."""
        return self.compute.is_healthy

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
        negative_prompt: Prompt | None = None,
        progress: Callable[[int, int], None] | None = None,
        is_cancelled: Callable[[], bool] | None = None,
    ) -> GenerationOutput:
        """Generate images of one prompt; see `GenerationRequest` for the arguments and `generate` for the errors."""
        request = GenerationRequest(
            *(prompt, num_outputs, candidates, guidance, temperature, top_k, top_p, seed),
            *(keep, keep_rows, target_score, seconds, negative_prompt),
        )
        return self.generate([request], progress, is_cancelled)[0]

    def embed(self, prompt: Prompt) -> Tensor:
        """Embed a prompt: the weighted sum of its parts' CLIP embeddings, normalised, (D,) float32.

        The GPT is conditioned on it, and candidates are ranked by it.

        Raises:
            RequestError: it is empty, or its parts cancel each other out.
        """
        return self.compute.run(self._encode_prompt, prompt)

    def query_index(self, prompt: Prompt) -> IndexMatch | None:
        """Compare a prompt with the training images; None where the weights have no index of them.

        Raises:
            RequestError: as `embed`.
        """
        return self.compute.run(lambda: self._match(prompt, self._encode_prompt(prompt)))

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        progress: Callable[[int, int], None] | None = None,
        is_cancelled: Callable[[], bool] | None = None,
        on_preview: Callable[[list[Image.Image]], None] | None = None,
        previews: int = 4,
    ) -> list[GenerationOutput]:
        """Generate several requests together; each gives the same images as alone, whatever other threads generate.

        Args:
            progress: called with (tokens done, tokens in all) over all requests.
            is_cancelled: called before each token and before each batch of images is decoded. Everyone waits for it: be
                quick.
            on_preview: called with the first `num_outputs` candidates of each request as far as they are decoded, the
                rest grey. CLIP may pick others in the end.
            previews: how often at most, from 1 to the rows of tokens less one.

        Raises:
            RequestError: a prompt cannot be embedded, or more rows are to be kept than there are.
            Cancelled: `is_cancelled` returned True.
            EngineError, InsufficientMemoryError: see `Engine.generate`.
        """
        seconds: dict[str, float] = defaultdict(float)
        start = time.perf_counter()
        with _timed(seconds, "embed"):
            jobs = self.compute.run(self._prepare, requests)
        length, done = self.config.gpt.block_size, 0
        total = length * sum(request.num_candidates for request in requests)
        while wave := [(job, seed) for job in jobs for seed in job.next_wave(start)]:
            with _timed(seconds, "decode_tokens"):
                decoded = self.engine.generate(
                    [job.sequence(seed) for job, seed in wave],
                    None if progress is None else _offset(progress, done, total),
                    is_cancelled,
                    None if on_preview is None else previewer(self.image_decoder, on_preview, wave),
                    every=preview_interval(self.config.vqgan.grid, previews),
                )
            seconds["queue"] += decoded.queue_time
            seconds["decode_tokens"] -= decoded.queue_time
            embeddings = torch.stack([job.embedding for job, _ in wave])
            for (job, seed), image in zip(
                wave, self.image_decoder.decode(decoded.tokens, embeddings, is_cancelled), strict=True
            ):
                job.add(seed, image)
                for stage, spent in zip(("decode_pixels", "rank"), image.seconds, strict=True):
                    seconds[stage] += spent
            done += length * len(wave)
        if progress is not None and done < total:  # a budget ended it early
            progress(total, total)
        seconds["total"] = time.perf_counter() - start
        outputs = self.compute.run(lambda: [self._output(job, seconds) for job in jobs])
        for output in outputs if self.digest else ():  # hashing large images here holds up no other thread
            output.receipts.extend(receipts(self, output, self.digest))
        return outputs

    # --- on the compute thread ---

    def _prepare(self, requests: Sequence[GenerationRequest]) -> list[Job]:
        jobs = [self._job(request) for request in requests]
        synchronize(self.device)  # so that the stage's time is its own
        return jobs

    def _job(self, request: GenerationRequest) -> Job:
        seed = new_seed() if request.seed is None else request.seed
        params = request.sampling(self.config.sampling)
        negative = request.negative_prompt
        negative_embedding = None if negative is None else self._encode_prompt(negative, "negative_prompt")
        embedding = self._encode_prompt(request.prompt)
        match = self._match(request.prompt, embedding)
        return Job(request, seed, params, embedding, negative_embedding, self._prefix(request), match)

    def _encode_prompt(self, prompt: Prompt, field: str = "prompt") -> Tensor:
        """Embedding (D,) of a prompt; `field` is whose prompt it is."""
        parts = parts_of(prompt, field)
        embeddings = torch.cat([self._encode_part(part) for part, _ in parts])
        weights = torch.tensor([weight for _, weight in parts], device=self.device)
        total = (weights[:, None] * embeddings).sum(0)
        if total.norm() < 1e-4:
            raise RequestError(field, "has parts that cancel each other out; change their weights")
        return F.normalize(total, dim=0)

    def _encode_part(self, part: str | Image.Image) -> Tensor:
        if isinstance(part, str):
            return self.clip.encode_text([part])
        return self.clip.encode_image(to_clip([part], self.clip.image_size))

    def _match(self, prompt: Prompt, embedding: Tensor) -> IndexMatch | None:
        if self.index is None:
            return None
        parts = [(isinstance(part, str), abs(weight)) for part, weight in parts_of(prompt)]
        text_share = sum(weight for is_text, weight in parts if is_text) / sum(weight for _, weight in parts)
        return self.index.query(embedding, text_share)

    def _prefix(self, request: GenerationRequest) -> Tensor | None:
        """The tokens of the rows that a request keeps."""
        if request.keep is None:
            return None
        config = self.config.vqgan
        if request.keep_rows >= config.grid:
            raise RequestError(
                "keep_rows",
                f"is {request.keep_rows}; this model generates {config.grid} rows, so keep 1 to {config.grid - 1}",
            )
        pixels = to_pixels([request.keep], config.image_size).to(self.device, self.dtype)
        return self.vqgan.encode_tokens(pixels)[0, : request.keep_rows * config.grid]

    def _output(self, job: Job, seconds: dict[str, float]) -> GenerationOutput:
        request = job.request
        negative = [] if request.negative_prompt is None else parts_of(request.negative_prompt)
        texts = [part for part, _ in parts_of(request.prompt) + negative if isinstance(part, str)]
        _, cut = self.clip.tokenize(texts)
        return GenerationOutput(
            images=from_pixels(torch.stack([image.pixels for _, image in job.best])),
            scores=[image.score for _, image in job.best],
            seeds=[seed for seed, _ in job.best],
            seed=job.seed,
            request=request,
            truncated=" ".join(filter(None, cut)),
            seconds=dict(seconds),
            num_generated=job.num_generated,
            match=job.match,
        )


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] += time.perf_counter() - start


def _offset(progress: Callable[[int, int], None], before: int, total: int) -> Callable[[int, int], None]:
    """Report the progress of one wave as progress of the whole."""
    return lambda done, _: progress(before + done, total)
