"""Evaluate a model: generated images against prompts and real images, and the VQGAN's reconstructions.

Frechet distances are given as FID-k (Ramesh et al., arXiv 2102.12092): both sets are resized to the model's image size
and blurred with radius k, so that k > 0 ignores details that a VQGAN cannot represent.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor, nn

from clipgen.errors import DataError, RequestError
from clipgen.evaluation.caption_score import Captioner
from clipgen.evaluation.features import Extractor, as_bytes
from clipgen.evaluation.metrics import Gaussian, class_score, clip_score, frechet_distance, psnr, r_precision
from clipgen.images.pixels import from_pixels, load_image, to_clip, to_pixels
from clipgen.images.sources import Source
from clipgen.pipeline import ClipGen
from clipgen.request import MAX_SEED, GenerationRequest, Part
from clipgen.utils.distributed import Processes
from clipgen.utils.memory import MAX_NUM_SEQS

RADII = (0, 1, 2, 4, 8)
BATCH = 32
"""Images measured together."""
SPLITS = 10
"""Parts that a class score is averaged over."""
NAMES = {
    "inception": ("fid", "inception_score", "rfid"),
    "clip": ("clip_fd", "clip_class_score", "clip_rfd"),
    "efficientnet": ("efficientnet_fd", "efficientnet_class_score", "efficientnet_rfd"),
}
"""Names of the distance, the class score and the VQGAN's distance: "FID" and "IS" are reserved for Inception."""


class FeatureStats:
    """Statistics of one of the two compared sets: a Gaussian of its features for every blur radius."""

    def __init__(self, extractor: Extractor) -> None:
        self.extract = extractor.run
        self.gaussians = {radius: Gaussian(extractor.size) for radius in RADII}

    def add(self, images: Sequence[Image.Image]) -> Tensor:
        """Add images of one size; returns the logits (N, C) of the unblurred ones."""
        for radius, gaussian in self.gaussians.items():
            blurred = [image.filter(ImageFilter.GaussianBlur(radius)) for image in images] if radius else images
            features, found = self.extract(blurred)
            gaussian.add(features)
            if not radius:
                logits = found
        return logits

    def share(self, processes: Processes) -> None:
        """All-reduce the statistics over the processes, in place."""
        for gaussian in self.gaussians.values():
            gaussian.share(processes.add_up)


@dataclass
class _Evaluation:
    """This process's share of one evaluation.

    Networks run on the pipeline's compute thread, a batch at a time: two threads that compute slow each other down.
    `generate` is called from the caller's thread, since it waits for the compute thread.
    """

    pipe: ClipGen
    extractor: Extractor
    lpips: nn.Module | None
    captioner: Captioner | None
    source: Source
    seed: int
    candidates: int
    processes: Processes
    progress: Callable[[int, int], None]
    total: int
    """Images that this process measures: its share of the real and of the generated ones."""
    done: int = 0
    unreadable: list[str] = field(default_factory=list)

    def report(self, count: int) -> None:
        """Report that so many images more are measured."""
        self.done += count
        self.progress(self.done, self.total)

    def read(self, index: int) -> Image.Image | None:
        """A reference image at the model's size; None, with the failure recorded, if it cannot be read."""
        try:
            image = load_image(self.source.read(index))
        except (DataError, OSError) as error:
            self.unreadable.append(f"{self.source.names[index]}: {error}")
            return None
        return from_pixels(to_pixels([image], self.pipe.config.vqgan.image_size))[0]

    def measure_reference(self) -> tuple[FeatureStats, list[int], dict[str, float]]:
        """Measure the real images and their reconstructions: statistics, indices of the readable ones, figures."""
        extractor = self.extractor
        real, rebuilt = FeatureStats(extractor), Gaussian(extractor.size)
        readable: list[int] = []
        sums = torch.zeros(2, dtype=torch.float64)  # PSNR, LPIPS
        codes = torch.zeros(self.pipe.config.vqgan.codebook_size, dtype=torch.float64)
        for numbers in _chunks(self.processes.own(len(self.source.names)), BATCH):
            found = [(i, image) for i in numbers if (image := self.read(i)) is not None]
            self.report(len(numbers))
            if not found:
                continue
            readable += [i for i, _ in found]
            images = [image for _, image in found]
            tokens, copies = self.pipe.compute.run(self.reconstruct, images)
            codes += torch.bincount(tokens.flatten().cpu(), minlength=len(codes))
            self.pipe.compute.run(real.add, images)
            rebuilt.add(self.pipe.compute.run(extractor.run, copies)[0])
            lpips = self.pipe.compute.run(self.perceptual_distance, copies, images)
            sums += torch.stack([psnr(as_bytes(copies), as_bytes(images)).sum(), lpips])
        everyone = sorted(i for part in self.processes.gather(readable) for i in part)
        if not everyone:
            raise DataError(f"none of the {len(self.source.names)} reference images can be read")
        real.share(self.processes)
        rebuilt.share(self.processes.add_up)
        sums, codes = self.processes.add_up(sums), self.processes.add_up(codes)
        figures = {
            "psnr": float(sums[0]) / len(everyone),
            **({"lpips": float(sums[1]) / len(everyone)} if self.lpips else {}),
            NAMES[extractor.kind][2]: frechet_distance(rebuilt, real.gaussians[0]),
            "codes_used": float((codes > 0).double().mean()),
        }
        return real, everyone, figures

    @torch.inference_mode()
    def reconstruct(self, images: Sequence[Image.Image]) -> tuple[Tensor, list[Image.Image]]:
        """Tokens (N, T) of images, and the VQGAN's reconstructions."""
        pixels = to_pixels(images, self.pipe.config.vqgan.image_size).to(self.pipe.device, self.pipe.dtype)
        tokens = self.pipe.vqgan.encode_tokens(pixels)
        return tokens, from_pixels(self.pipe.vqgan.decode_tokens(tokens))

    @torch.inference_mode()
    def perceptual_distance(self, a: Sequence[Image.Image], b: Sequence[Image.Image]) -> Tensor:
        """Sum of the LPIPS of pairs of images; 0 without LPIPS."""
        if self.lpips is None:
            return torch.zeros((), dtype=torch.float64)
        x, y = (to_pixels(images, images[0].width).to(self.pipe.device) for images in (a, b))
        return self.lpips(x, y).cpu().double().sum()

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """CLIP embeddings (N, D) on the CPU."""
        return self.pipe.clip.encode_image(to_clip(images, self.pipe.clip.image_size)).cpu()

    def measure_generated(self, prompts: Sequence[str] | Sequence[int]) -> tuple[FeatureStats, dict[str, Any]]:
        """Generate an image for each prompt (a text, or the number of a reference image) and measure them."""
        extractor, captioner, compute = self.extractor, self.captioner, self.pipe.compute
        stats = FeatureStats(extractor)
        batches: list[tuple[Tensor, ...]] = []
        for numbers in _chunks(self.processes.own(len(prompts)), max(1, MAX_NUM_SEQS // self.candidates)):
            parts = [self.part(prompts[i]) for i in numbers]
            seeds = [(self.seed + i * self.candidates) % (MAX_SEED - self.candidates) for i in numbers]
            requests = [
                GenerationRequest(p, candidates=self.candidates, seed=s) for p, s in zip(parts, seeds, strict=True)
            ]
            images = [output.images[0] for output in self.pipe.generate(requests)]
            logits = compute.run(stats.add, images)
            image_embeddings = compute.run(self.embed_images, images)
            prompt_embeddings = torch.stack([self.pipe.embed(part) for part in parts]).cpu()
            texts = [part for part in parts if isinstance(part, str)]
            caps = compute.run(captioner.likelihoods, images, texts) if captioner and texts else torch.zeros(len(parts))
            batches.append((torch.tensor(numbers), image_embeddings, prompt_embeddings, caps, logits))
            self.report(len(numbers))
        stats.share(self.processes)
        everyone = [batch for part in self.processes.gather(batches) for batch in part]
        places, *unordered = (torch.cat(column) for column in zip(*everyone, strict=True))
        image_embeddings, prompt_embeddings, caps, logits = (column[places.argsort()] for column in unordered)
        share, among = r_precision(image_embeddings, prompt_embeddings)
        similarities = F.cosine_similarity(image_embeddings.double(), prompt_embeddings.double())
        figures: dict[str, Any] = {
            "clip_score": clip_score(similarities),
            "clip_cosine": float(similarities.mean()),
            "r_precision": {"share": share, "among": among},
        }
        if extractor.classes:
            splits = min(SPLITS, len(logits))
            mean, deviation = class_score(logits, splits)
            figures[NAMES[extractor.kind][1]] = {"mean": mean, "std": deviation, "splits": splits}
        if captioner:
            figures["caption_score"] = float(caps.double().mean())
        return stats, figures

    def part(self, prompt: str | int) -> Part:
        """The pipeline's input for a prompt."""
        if isinstance(prompt, str):
            return prompt
        image = self.read(prompt)
        if image is None:
            raise DataError(f"{self.source.names[prompt]} was readable before but no longer is")
        return image


def evaluate_model(
    pipe: ClipGen,
    extractor: Extractor,
    prompts: Sequence[str] | None,
    source: Source,
    lpips: nn.Module | None = None,
    captioner: Captioner | None = None,
    seed: int = 0,
    candidates: int = 1,
    processes: Processes = Processes(),  # noqa: B008 - immutable
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Evaluate a model. All processes call this and get the same figures as a single process, up to rounding.

    Args:
        prompts: sentences to generate from; None generates a variation of every reference image, from its embedding.
        seed: prompt i generates its candidates from seed + i * candidates on.
        candidates: images per prompt, of which CLIP's best is measured.
        progress: called with the number of images that this process has finished, and of those it measures in all:
            its share of the reference and of the prompts.

    Returns:
        JSON-able: "figures", "left_out" (name -> reason), "warnings", "settings", "prompts", "reference", "features".

    Raises:
        DataError: no reference image can be read.
        RequestError: candidates or seed are out of range, or a captioner is given without sentences.
    """
    if prompts is None and captioner:
        raise RequestError("captioner", "needs sentences to score; give --prompts")
    GenerationRequest("a prompt", candidates=candidates, seed=seed)  # checks their ranges
    started = time.perf_counter()
    total = sum(len(processes.own(len(part))) for part in (source.names, source.names if prompts is None else prompts))
    run = _Evaluation(pipe, extractor, lpips, captioner, source, seed, candidates, processes, progress, total)
    with processes.joined():
        real, readable, vqgan = run.measure_reference()
        generated, figures = run.measure_generated(readable if prompts is None else prompts)
        unreadable = sorted({line for part in processes.gather(run.unreadable) for line in part})
    distance, classes, _ = NAMES[extractor.kind]
    distances = {str(r): frechet_distance(generated.gaussians[r], real.gaussians[r]) for r in RADII}
    count = len(readable) if prompts is None else len(prompts)
    asked = "\n".join(prompts or []).encode()
    return {
        "figures": {distance: distances, **figures, "vqgan": vqgan},
        "left_out": _left_out(run, classes, prompts),
        "warnings": _warnings(extractor, distance, count, len(readable), figures["r_precision"]["among"]),
        "features": {
            "kind": extractor.kind,
            "what": extractor.what,
            "size": extractor.size,
            "sha256": extractor.sha256,
        },
        "prompts": {
            "what": "sentences" if prompts is not None else "the reference images themselves, by their embeddings",
            "count": count,
            "sha256": hashlib.sha256(asked).hexdigest() if prompts is not None else None,
        },
        "reference": {
            "count": len(readable),
            "unreadable": unreadable,
            "unused": dict(source.unused),
            "sha256": source.fingerprint(),
        },
        "settings": {
            "model": pipe.config.name,
            "image_size": pipe.config.vqgan.image_size,
            "seed": seed,
            "candidates": candidates,
            **asdict(pipe.config.sampling),
            "blur_radii": list(RADII),
            "device": str(pipe.device),
            "dtype": pipe.precision,
            "processes": processes.count,
            "torch": torch.__version__,
        },
        "seconds": round(time.perf_counter() - started, 1),
    }


def _left_out(run: _Evaluation, classes: str, prompts: Sequence[str] | None) -> dict[str, str]:
    """Figures that are missing, and why."""
    found = {}
    if not run.extractor.classes:
        found["inception_score"] = f"{run.extractor.kind} features have no classes"
    elif classes != "inception_score":
        found["inception_score"] = f"defined for Inception only; {classes} uses {run.extractor.kind} instead"
    if run.extractor.kind != "inception":
        found["fid"] = f"defined for Inception only; the distance here uses {run.extractor.kind} features instead"
    if run.lpips is None:
        found["lpips"] = "VGG16 is not downloaded; run: clipgen weights fetch vgg16"
    if run.captioner is None:
        found["caption_score"] = "no captioner was given" if prompts is not None else "no sentences were given"
    return found


def _warnings(extractor: Extractor, distance: str, generated: int, real: int, among: int) -> list[str]:
    """Caveats about the figures."""
    found = []
    few = min(generated, real)
    if few <= extractor.size:
        found.append(
            f"{few} images are too few for {extractor.size} features: {distance} is far too high and comparable "
            f"only between equal numbers of images; use more than {extractor.size}, papers use 10,000 to 50,000"
        )
    if extractor.classes and generated < 5000:
        found.append(
            f"{generated} images are few for a class score over {extractor.classes} classes; papers use 50,000"
        )
    if among < 100:
        found.append(f"R-precision among {among} different prompts is easier than the usual 100")
    found.append(
        "CLIP score and R-precision are not independent: they use the model's own CLIP, which conditions and ranks"
    )
    return found


def _chunks(numbers: range, size: int) -> Iterator[range]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))
