"""A model measured: what it draws against its prompts and against real pictures, and what its VQGAN keeps of those.

Frechet distances as FID-k (Ramesh et al., arXiv 2102.12092): both sides are brought to the model's size and blurred
with radius k, so that k > 0 compares what a VQGAN can draw and leaves out the details that it cannot.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn

from clipgen.errors import DataError, RequestError
from clipgen.evaluation.caption_score import Captioner
from clipgen.evaluation.features import Extractor, as_bytes
from clipgen.evaluation.metrics import ClassScore, Gaussian, clip_score, cosines, frechet_distance, psnr, r_precision
from clipgen.images.pixels import from_pixels, load_image, to_clip, to_pixels
from clipgen.images.sources import Source
from clipgen.pipeline import ClipGen
from clipgen.request import MAX_SEED, GenerationRequest, Part
from clipgen.utils.distributed import Processes

RADII = (0, 1, 2, 4, 8)
BATCH = 32
"""Pictures measured together."""
CANDIDATES = 64
"""Candidates drawn together."""
NAMES = {
    "inception": ("fid", "inception_score", "rfid"),
    "clip": ("clip_fd", "clip_class_score", "clip_rfd"),
    "efficientnet": ("efficientnet_fd", "efficientnet_class_score", "efficientnet_rfd"),
}
"""What the distance, the class score and the VQGAN's distance are called: FID and IS are Inception's alone."""


@dataclass(frozen=True)
class Evaluators:
    """What measures; None is left out and named so."""

    extractor: Extractor
    lpips: nn.Module | None = None
    captioner: Captioner | None = None


class FeatureStats:
    """One of the two sets that are compared: a Gaussian of its features for every radius."""

    def __init__(self, extractor: Extractor) -> None:
        self.run = extractor.run
        self.gaussians = {radius: Gaussian(extractor.size) for radius in RADII}

    def add(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Take in pictures of one size; returns the logits (N, C) of the sharp ones."""
        for radius, gaussian in self.gaussians.items():
            blurred = [p.filter(ImageFilter.GaussianBlur(radius)) for p in pictures] if radius else pictures
            features, found = self.run(blurred)
            gaussian.add(features)
            if not radius:
                logits = found
        return logits

    def share(self, processes: Processes) -> None:
        """Become the statistics of all processes."""
        for gaussian in self.gaussians.values():
            gaussian.share(processes.add_up)


@dataclass
class Run:
    """One evaluation under way in this process."""

    pipe: ClipGen
    instruments: Evaluators
    source: Source
    seed: int
    candidates: int
    processes: Processes
    progress: Callable[[int], None]
    unreadable: list[str] = field(default_factory=list)

    def read(self, index: int) -> Image.Image | None:
        """A reference picture at the model's size; None, and noted, if it cannot be read."""
        try:
            picture = load_image(self.source.read(index))
        except (DataError, OSError) as error:
            self.unreadable.append(f"{self.source.names[index]}: {error}")
            return None
        return from_pixels(to_pixels([picture], self.pipe.config.vqgan.image_size))[0]

    def reference(self) -> tuple[FeatureStats, list[int], dict[str, float | None]]:
        """Measure the real pictures and what the VQGAN makes of them: their side, their numbers, its figures."""
        real, made = FeatureStats(self.instruments.extractor), Gaussian(self.instruments.extractor.size)
        readable: list[int] = []
        sums = torch.zeros(2, dtype=torch.float64)  # PSNR, LPIPS
        codes = torch.zeros(self.pipe.config.vqgan.codebook_size, dtype=torch.float64)
        for numbers in _chunks(self.processes.own(len(self.source.names)), BATCH):
            found = [(i, picture) for i in numbers if (picture := self.read(i)) is not None]
            self.progress(len(numbers))
            if not found:
                continue
            readable += [i for i, _ in found]
            pictures = [picture for _, picture in found]
            real.add(pictures)
            tokens, copies = self.round_trip(pictures)
            codes += torch.bincount(tokens.flatten().cpu(), minlength=len(codes))
            made.add(self.instruments.extractor.run(copies)[0])
            sums += torch.stack([psnr(as_bytes(copies), as_bytes(pictures)).sum(), self.perceptual(copies, pictures)])
        everyone = sorted(i for part in self.processes.gather(readable) for i in part)
        if not everyone:
            raise DataError(f"none of the {len(self.source.names)} reference pictures can be read")
        real.share(self.processes)
        made.share(self.processes.add_up)
        sums, codes = self.processes.add_up(sums), self.processes.add_up(codes)
        figures = {
            "psnr": float(sums[0]) / len(everyone),
            "lpips": float(sums[1]) / len(everyone) if self.instruments.lpips else None,
            NAMES[self.instruments.extractor.kind][2]: frechet_distance(made, real.gaussians[0]),
            "codes_used": float((codes > 0).double().mean()),
        }
        return real, everyone, figures

    @torch.inference_mode()
    def round_trip(self, pictures: Sequence[Image.Image]) -> tuple[Tensor, list[Image.Image]]:
        """Tokens (N, T) of pictures, and the pictures that the VQGAN decodes them to."""
        pixels = to_pixels(pictures, self.pipe.config.vqgan.image_size).to(self.pipe.device, self.pipe.dtype)
        tokens = self.pipe.vqgan.encode_tokens(pixels)
        return tokens, from_pixels(self.pipe.vqgan.decode_tokens(tokens))

    @torch.inference_mode()
    def perceptual(self, a: Sequence[Image.Image], b: Sequence[Image.Image]) -> Tensor:
        """Sum of the LPIPS of pairs of pictures, 0 without LPIPS."""
        if self.instruments.lpips is None:
            return torch.zeros((), dtype=torch.float64)
        x, y = (to_pixels(side, side[0].width).to(self.pipe.device) for side in (a, b))
        return self.instruments.lpips(x, y).double().sum().cpu()

    def drawn(self, prompts: Sequence[str] | Sequence[int]) -> tuple[FeatureStats, dict[str, Any]]:
        """Draw the best of the candidates for each prompt, a text or the number of a reference picture."""
        tools = self.instruments
        side = FeatureStats(tools.extractor)
        score = ClassScore(len(prompts), tools.extractor.classes) if tools.extractor.classes else None
        rows: list[tuple[int, Tensor, Tensor, float]] = []
        for numbers in _chunks(self.processes.own(len(prompts)), max(1, CANDIDATES // self.candidates)):
            parts = [self.part(prompts[i]) for i in numbers]
            seeds = [(self.seed + i * self.candidates) % (MAX_SEED - self.candidates) for i in numbers]
            requests = [
                GenerationRequest(p, candidates=self.candidates, seed=s) for p, s in zip(parts, seeds, strict=True)
            ]
            pictures = [result.images[0] for result in self.pipe.generate(requests)]
            logits = side.add(pictures)
            if score:
                score.add(numbers, logits)
            with torch.inference_mode():
                seen = self.pipe.clip.encode_image(to_clip(pictures, self.pipe.clip.image_size)).cpu()
            meant = torch.stack([self.pipe.embed(part) for part in parts]).cpu()
            texts = [part for part in parts if isinstance(part, str)]
            caps = (
                tools.captioner.likelihoods(pictures, texts) if tools.captioner and texts else torch.zeros(len(parts))
            )
            rows += zip(numbers, seen, meant, caps.tolist(), strict=True)
            self.progress(len(numbers))
        side.share(self.processes)
        if score:
            score.share(self.processes.add_up)
        everyone = sorted((row for part in self.processes.gather(rows) for row in part), key=lambda row: row[0])
        seen = torch.stack([row[1] for row in everyone])
        meant = torch.stack([row[2] for row in everyone])
        found, among = r_precision(seen, meant)
        similar = cosines(seen, meant)
        figures: dict[str, Any] = {
            "clip_score": clip_score(similar),
            "clip_cosine": float(similar.mean()),
            "r_precision": {"share": found, "among": among},
        }
        if score:
            mean, deviation = score.result()
            figures[NAMES[tools.extractor.kind][1]] = {"mean": mean, "std": deviation, "splits": score.splits}
        if tools.captioner:
            figures["caption_score"] = sum(row[3] for row in everyone) / len(everyone)
        return side, figures

    def part(self, prompt: str | int) -> Part:
        """What the pipeline draws from."""
        if isinstance(prompt, str):
            return prompt
        picture = self.read(prompt)
        if picture is None:
            raise DataError(f"{self.source.names[prompt]} could be read before and cannot be now")
        return picture


def evaluate(
    pipe: ClipGen,
    instruments: Evaluators,
    prompts: Sequence[str] | None,
    source: Source,
    seed: int = 0,
    candidates: int = 1,
    processes: Processes | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Measure a model; all processes call this and get the same figures as one process would, up to rounding.

    Args:
        instruments: what measures.
        prompts: sentences to draw; None draws every reference picture's own variation, from its embedding.
        source: the real pictures.
        seed: prompt i draws its candidates from seed + i * candidates on.
        candidates: pictures drawn for each prompt, of which CLIP's best is measured.
        progress: told how many more pictures this process has done, of (reference + prompts) / processes in all.

    Returns:
        JSON-able: "figures", "left_out" (name -> why), "warnings", "settings", "prompts", "reference", "features".

    Raises:
        DataError: no reference picture can be read.
        RequestError: candidates or seed out of range, or a captioner without sentences.
    """
    if prompts is None and instruments.captioner:
        raise RequestError("captioner", "needs sentences to find likely; give --prompts")
    GenerationRequest("a prompt", candidates=candidates, seed=seed)  # its ranges
    processes = processes or Processes()
    started = time.perf_counter()
    run = Run(pipe, instruments, source, seed, candidates, processes, progress)
    with processes.joined():
        real, readable, vqgan = pipe.compute.run(run.reference)
        drawn, figures = run.drawn(readable if prompts is None else prompts)
        unreadable = sorted({line for part in processes.gather(run.unreadable) for line in part})
    tools = instruments.extractor
    distance, classes, _ = NAMES[tools.kind]
    distances = {str(r): frechet_distance(drawn.gaussians[r], real.gaussians[r]) for r in RADII}
    count = len(readable) if prompts is None else len(prompts)
    asked = "\n".join(prompts or []).encode()
    sampling = GenerationRequest("a prompt").sampling(pipe.config.sampling)
    return {
        "figures": {distance: distances, **figures, "vqgan": {k: v for k, v in vqgan.items() if v is not None}},
        "left_out": _left_out(instruments, classes, prompts),
        "warnings": _warnings(tools, distance, count, len(readable), figures["r_precision"]["among"]),
        "features": {"kind": tools.kind, "what": tools.what, "size": tools.size, "sha256": tools.sha256},
        "prompts": {
            "what": "sentences" if prompts is not None else "the reference pictures themselves, by their embeddings",
            "count": count,
            "sha256": hashlib.sha256(asked).hexdigest() if prompts is not None else None,
        },
        "reference": {
            "count": len(readable),
            "unreadable": unreadable,
            "sha256": hashlib.sha256("\n".join(source.names).encode()).hexdigest(),
        },
        "settings": {
            "model": pipe.config.name,
            "image_size": pipe.config.vqgan.image_size,
            "seed": seed,
            "candidates": candidates,
            **asdict(sampling),
            "blur_radii": list(RADII),
            "device": str(pipe.device),
            "dtype": pipe.precision,
            "processes": processes.count,
            "torch": torch.__version__,
        },
        "seconds": round(time.perf_counter() - started, 1),
    }


def _left_out(instruments: Evaluators, classes: str, prompts: Sequence[str] | None) -> dict[str, str]:
    """What is not among the figures, and why."""
    found = {}
    if not instruments.extractor.classes:
        found["inception_score"] = f"{instruments.extractor.kind} features have no classes"
    elif classes != "inception_score":
        found["inception_score"] = f"it is Inception's; {classes} is that of {instruments.extractor.kind}"
    if instruments.extractor.kind != "inception":
        found["fid"] = f"it is Inception's; the distance is that of {instruments.extractor.kind} features"
    if instruments.lpips is None:
        found["lpips"] = "VGG16 is not here; python -m clipgen weights fetch vgg16"
    if instruments.captioner is None:
        found["caption_score"] = "no captioner given" if prompts is not None else "there are no sentences"
    return found


def _warnings(tools: Extractor, distance: str, drawn: int, real: int, among: int) -> list[str]:
    """What not to make of the figures."""
    found = []
    few = min(drawn, real)
    if few <= tools.size:
        found.append(
            f"{few} pictures are too few for {tools.size} features: {distance} is far too high and only comparable at "
            f"the same numbers of pictures; use more than {tools.size}, papers use 10,000 to 50,000"
        )
    if tools.classes and drawn < 5000:
        found.append(
            f"{drawn} drawn pictures are few for a class score over {tools.classes} classes; papers use 50,000"
        )
    if among < 100:
        found.append(f"R-precision among {among} different prompts is easier than the usual 100")
    found.append(
        "CLIP score and R-precision are by the model's own CLIP, which conditions and ranks: no independent judge"
    )
    return found


def _chunks(numbers: range, size: int) -> Iterator[range]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))
