"""Catalog of published checkpoints: addresses, sizes, hashes, licences. Data only.

Nothing here is guessed. A size or hash that the publisher does not state is None, and is recorded at the first download
(`clipgen.weights.cache`).
"""

from __future__ import annotations

from dataclasses import dataclass

_HFAILAB = "https://github.com/HFAiLab/clip-gen/releases/download/v0.1.0"
_OPENAI_VIT_B32 = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"


@dataclass(frozen=True)
class File:
    """One published file.

    Attributes:
        name: file name in the cache and on mirrors; never taken from a server.
        part: "clip", "vqgan" or "gpt" of a model, "inception" or "vgg16" to evaluate one.
        url: address at its publisher.
        size: bytes, where the publisher states it.
        sha256: lower-case hexadecimal, where the publisher states it.
        tensors: bytes of the model's tensors, by their published shapes; the file may also hold training state.
    """

    name: str
    part: str
    url: str
    size: int | None = None
    sha256: str | None = None
    tensors: int | None = None


@dataclass(frozen=True)
class PretrainedModel:
    """A published model, or a part of one.

    Attributes:
        name: argument of `clipgen weights fetch`.
        what: description in one line.
        page: page of its publisher.
        licence: of the files, as far as the publisher states one.
        files: at most one of each part.
        config: name of the configuration of a whole model; None for a part of a model.
    """

    name: str
    what: str
    page: str
    licence: str
    files: tuple[File, ...]
    config: str | None = None


CATALOG: dict[str, PretrainedModel] = {
    entry.name: entry
    for entry in (
        PretrainedModel(
            name="coco",
            what="the whole CLIP-GEN model trained on MS-COCO, 256 px: CLIP ViT-B/32, VQGAN, GPT2-medium",
            page="https://github.com/HFAiLab/clip-gen",
            licence="none stated by HFAiLab; its CLIP is OpenAI's (MIT)",
            files=(
                File("clip_vit_b32.pt", "clip", f"{_HFAILAB}/clip_vit_b32.pt", tensors=605_109_252),
                File("vqgan_coco.pt", "vqgan", f"{_HFAILAB}/vqgan_coco.pt", tensors=315_365_160),
                File("gpt_coco.pt", "gpt", f"{_HFAILAB}/gpt_coco.pt", tensors=1_348_251_648),
            ),
            config="coco",
        ),
        PretrainedModel(
            name="openai-vit-b32",
            what="OpenAI's CLIP ViT-B/32: the CLIP of coco and imagenet",
            page="https://github.com/openai/CLIP",
            licence="MIT",
            files=(
                File(
                    "ViT-B-32.pt",
                    "clip",
                    # From the `clip` package, which checks the same hash: the last folder of the address.
                    f"https://openaipublic.azureedge.net/clip/models/{_OPENAI_VIT_B32}/ViT-B-32.pt",
                    sha256=_OPENAI_VIT_B32,
                ),
            ),
        ),
        PretrainedModel(
            name="taming-imagenet-f16-16384",
            what="CompVis' VQGAN trained on ImageNet, 16,384 codes: stage 1 for imagenet",
            page="https://github.com/CompVis/taming-transformers",
            licence="MIT, as its code",
            files=(
                File(
                    "vqgan_imagenet_f16_16384.ckpt",
                    "vqgan",
                    "https://heibox.uni-heidelberg.de/f/867b05fc8c4841768640/?dl=1",
                    tensors=304_295_436,
                ),
            ),
        ),
        PretrainedModel(
            name="inception",
            what="the InceptionV3 that FID and Inception Score are defined with, for evaluate",
            page="https://github.com/toshas/torch-fidelity",
            licence="Apache 2.0",
            files=(
                File(
                    "weights-inception-2015-12-05-6726825d.pth",
                    "inception",
                    # The address is torch-fidelity's own; the file name holds the first digits of its SHA-256.
                    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
                    "weights-inception-2015-12-05-6726825d.pth",
                    size=95_628_359,
                    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
                ),
            ),
        ),
        PretrainedModel(
            name="vgg16",
            what="torchvision's VGG16 trained on ImageNet: the network under LPIPS, for evaluate and stage 1",
            page="https://github.com/pytorch/vision",
            licence="BSD 3-clause, as its code",
            files=(
                File(
                    "vgg16-397923af.pth",
                    "vgg16",
                    "https://download.pytorch.org/models/vgg16-397923af.pth",
                    size=553_433_881,
                    sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
                ),
            ),
        ),
    )
}
