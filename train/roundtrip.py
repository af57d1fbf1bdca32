"""Round trip of images through the tokenizer: check what tokens keep before stage 2 learns them.

    python -m train.roundtrip --config mini --data photos --vqgan runs/vqgan --out runs/roundtrip

Encodes some images, decodes their tokens and compares. Writes OUT/roundtrip.json and OUT/roundtrip.png (originals above
their reconstructions). The exit code is 2 if stage 2 could learn nothing from such tokens.
"""

from __future__ import annotations

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

import json
from dataclasses import asdict, dataclass
from itertools import islice

import torch
from PIL import Image
from torch import Tensor

from clipgen.errors import DataError
from clipgen.evaluation.metrics import psnr
from clipgen.images.pixels import from_pixels, grid, save_image, to_pixels
from clipgen.images.sources import Source, Subset, open_source
from clipgen.models.vqgan import VQGAN
from clipgen.utils.files import write_text
from train.data.images import readable_images
from train.encode import load_vqgan
from train.loop.health import TrainingError
from train.loop.script import command, parse_args

MAX_IMAGES = 256
BATCH = 16
MIN_USED = 0.01
"""Fraction of the possible codes below which the codebook counts as collapsed."""


@dataclass(frozen=True)
class RoundTrip:
    """What the tokens of some images keep."""

    pictures: int
    """Number of images."""
    psnr: float
    """dB, mean over the images."""
    flat_psnr: float
    """The same if each image is replaced by its mean colour, which needs no tokens."""
    codes_used: int
    codes_possible: int
    """Size of the codebook, or number of tokens of the images if that is smaller."""

    def check(self) -> None:
        """Raises: TrainingError: there is nothing to learn from."""
        if self.psnr <= self.flat_psnr + 1:
            raise TrainingError(
                f"the tokens keep no more than a flat colour would ({self.psnr:.1f} dB, {self.flat_psnr:.1f} dB); "
                "train stage 1 for longer (stage1.steps), or look at its curves for what went wrong"
            )
        if self.codes_used < max(2, MIN_USED * self.codes_possible):
            raise TrainingError(
                f"only {self.codes_used} of {self.codes_possible} possible codes are in use: the codebook collapsed; "
                "train stage 1 again with model.vqgan.l2_codes=true or a smaller stage1.revive_every"
            )


@torch.no_grad()
def measure(vqgan: VQGAN, source: Source) -> tuple[RoundTrip, Image.Image]:
    """Encode and decode up to `MAX_IMAGES` images.

    Returns:
        The figures, and a grid of the first images with their reconstructions below.

    Raises:
        DataError: none of them can be read.
    """
    size, codes = vqgan.config.image_size, torch.zeros(vqgan.config.codebook_size)
    kept: list[float] = []
    flat: list[float] = []
    shown: tuple[Tensor, Tensor] | None = None
    images = readable_images(Subset(source, MAX_IMAGES))
    while batch := list(islice(images, BATCH)):
        x = to_pixels(batch, size)
        tokens = vqgan.encode_tokens(x)
        copy = vqgan.decode_tokens(tokens).clamp(-1, 1)
        mean = x.mean((2, 3), keepdim=True).expand_as(x)
        kept += psnr(copy, x, 2).tolist()
        flat += psnr(mean, x, 2).tolist()
        codes += torch.bincount(tokens.flatten(), minlength=len(codes))
        shown = shown or (x[:8], copy[:8])
    if shown is None:
        raise DataError(f"none of the {len(source.names)} images can be read")
    possible = min(len(codes), len(kept) * vqgan.config.num_tokens)
    used = int((codes > 0).sum())
    found = RoundTrip(len(kept), sum(kept) / len(kept), sum(flat) / len(flat), used, possible)
    return found, grid(from_pixels(torch.cat(shown)), columns=len(shown[0]))


@command
def main() -> None:
    args, config = parse_args(__doc__ or "", {"vqgan": "folder of stage 1, with vqgan.safetensors"})
    vqgan = load_vqgan(config.model.vqgan, args.vqgan / "vqgan.safetensors")
    found, figure = measure(vqgan, open_source(args.data))
    args.out.mkdir(parents=True, exist_ok=True)
    save_image(figure, args.out / "roundtrip.png")
    write_text(args.out / "roundtrip.json", json.dumps(asdict(found), indent=1) + "\n")
    print(
        f"{found.pictures} images: {found.psnr:.1f} dB ({found.flat_psnr:.1f} for a flat colour), "
        f"{found.codes_used} of {found.codes_possible} possible codes"
    )
    found.check()


if __name__ == "__main__":
    main()
