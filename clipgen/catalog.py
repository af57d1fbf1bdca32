"""What can be fetched: the published checkpoints, where they are, what is known of them. Data only.

Nothing here is guessed: a size or hash that the publisher does not state is None, and is recorded at the first download
instead (`clipgen.fetch`).
"""

from __future__ import annotations

from dataclasses import dataclass

_HFAILAB = "https://github.com/HFAiLab/clip-gen/releases/download/v0.1.0"
_OPENAI_VIT_B32 = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"


@dataclass(frozen=True)
class File:
    """One published file.

    Attributes:
        name: what it is called here, in the cache and on mirrors; never taken from a server.
        part: what it holds: "clip", "vqgan" or "gpt".
        url: where its publisher has it.
        size: bytes, where the publisher states it.
        sha256: lower-case hexadecimal, where the publisher states it.
        tensors: bytes of the model's tensors alone, from their published shapes; the file may also hold training state.
    """

    name: str
    part: str
    url: str
    size: int | None = None
    sha256: str | None = None
    tensors: int | None = None


@dataclass(frozen=True)
class Entry:
    """Files that belong together.

    Attributes:
        name: what `python -m clipgen weights fetch` is given.
        what: one line on what it is.
        page: where its publisher describes it.
        licence: of the files, as far as the publisher states one.
        files: at most one of each part.
        config: the configuration the files make a whole model of; None when they are only a part of one.
    """

    name: str
    what: str
    page: str
    licence: str
    files: tuple[File, ...]
    config: str | None = None


CATALOG: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
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
        Entry(
            name="openai-vit-b32",
            what="OpenAI's CLIP ViT-B/32: the CLIP of coco and imagenet",
            page="https://github.com/openai/CLIP",
            licence="MIT",
            files=(
                File(
                    "ViT-B-32.pt",
                    "clip",
                    # As in the `clip` package, which checks the same hash: it is the last folder of the address.
                    f"https://openaipublic.azureedge.net/clip/models/{_OPENAI_VIT_B32}/ViT-B-32.pt",
                    sha256=_OPENAI_VIT_B32,
                ),
            ),
        ),
        Entry(
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
    )
}
