"""The training index: coverage.safetensors beside the weights, which `clipgen.weights.training_index` reads.

    python -m train.index --weights weights/mine --encoded runs/encoded --data photos --prompts sentences.txt

Sentences such as users write about such images tell how near a prompt must be to count as near.
Shapes: N images, D embedding, M measured sentences.
"""

from __future__ import annotations

if __name__ == "__main__":
    from clipgen.utils.ctrl_c import end_at_ctrl_c

    end_at_ctrl_c()  # until main() takes over

import argparse
import json
import os
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from clipgen.errors import DataError
from clipgen.images.sources import open_source
from clipgen.models.clip import Clip
from clipgen.utils.entry_point import entry_point
from clipgen.utils.text import expand_home, printable, read_lines
from clipgen.weights.model_dir import MANIFEST, VERSION, fingerprint, read_manifest
from clipgen.weights.tensor_file import load_tensors, write_tensors
from clipgen.weights.training_index import FILE, NUM_NEAREST
from train.encode import Encoded

MIN_SENTENCES = 20
"""Fewest sentences that an index can be built from."""
RANK = 128
"""Directions of the embeddings that are kept: 128 of 384 hold 99.3 % of the mini model's training images."""
MAX_IMAGES = 18_000
"""Images in the index, spread evenly over larger sets."""


def build_index(images: Tensor, names: Sequence[str], texts: Tensor) -> dict[str, Tensor]:
    """Compute the tensors of an index.

    Args:
        images: (N, D) unit norm, embeddings of the training images.
        names: N of them.
        texts: (M, D) unit norm, sentences such as users write about such images. One half measures the gap, the other
            half how near such sentences are.
    """
    kept = torch.linspace(0, len(images) - 1, min(len(images), MAX_IMAGES)).long()
    images, names = images[kept], [names[i] for i in kept.tolist()]
    *_, directions = torch.linalg.svd(images, full_matrices=False)
    basis = directions[:RANK].half()
    inside = images @ basis.float().t()
    scale = (inside.abs().amax(dim=1) / 127).clamp(min=1e-8)
    codes = (inside / scale[:, None]).round().to(torch.int8)
    stored = codes.float() * scale[:, None]
    for_gap, for_distance = texts[::2], texts[1::2]
    nearest = (for_gap @ images.t()).argmax(dim=1)
    gap = (for_gap - images[nearest]).mean(dim=0)
    cosines = F.normalize(for_distance - gap, dim=1) @ basis.float().t() @ stored.t()
    measured = cosines.topk(min(NUM_NEAREST, len(images))).values.mean(dim=1)
    packed = zlib.compress(json.dumps(list(names), ensure_ascii=False).encode(), 9)
    return {
        "basis": basis,
        "images": codes,
        "scale": scale.half(),
        "gap": gap,
        "held": measured.sort().values,
        "names": torch.frombuffer(bytearray(packed), dtype=torch.uint8),
    }


def write_index(folder: str | Path, tensors: Mapping[str, Tensor]) -> Path:
    """Add an index to a model folder and its manifest. A later `save_model_dir` drops it from the manifest.

    Raises:
        WeightsError: the folder has no manifest.
    """
    folder = Path(folder)
    manifest = read_manifest(folder / MANIFEST)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as name:
        temporary = Path(name)
        write_tensors(temporary / FILE, tensors)
        text = json.dumps({"version": VERSION, "files": manifest | {FILE: fingerprint(temporary / FILE)}}, indent=2)
        (temporary / MANIFEST).write_text(text + "\n", encoding="utf-8")
        os.replace(temporary / FILE, folder / FILE)
        os.replace(temporary / MANIFEST, folder / MANIFEST)
    return folder / FILE


def add_index(weights: Path, encoded: Path, data: str | Path, prompts: Path) -> Path:
    """Write the index of a folder of weights, and name it in the manifest.

    Images that could not be read are left out: the encoded set holds others in their places, and says so beside it.

    Args:
        weights: the folder.
        encoded: an encoded set, or a .safetensors file with "embeddings" (N, D).
        data: the images that were encoded.
        prompts: sentences about such images, one a line.

    Raises:
        DataError: images and embeddings do not belong together, or there are too few sentences.
        WeightsError: the folder of weights has no manifest, or its CLIP cannot be read.
    """
    read_manifest(weights / MANIFEST)  # fails before the work, not after it; an old index may be damaged
    clip = Clip.from_state_dict(load_tensors(weights / "clip.safetensors"))
    files, data = [Path(name) for name in open_source(data).names], expand_home(data)
    embeddings = load_file(encoded)["embeddings"].float() if encoded.is_file() else Encoded(encoded).embeddings()
    if len(embeddings) % len(files):
        raise DataError(f"{encoded} holds {len(embeddings)} embeddings, {data} {len(files)} images: not the same set")
    sentences = [line.strip() for line in read_lines(prompts) if line.strip()]
    if len(sentences) < MIN_SENTENCES:
        raise DataError(f"{prompts} has {len(sentences)} sentences; give at least {MIN_SENTENCES}, one a line")
    with torch.inference_mode():
        texts = torch.cat([clip.encode_text(sentences[i : i + 64]) for i in range(0, len(sentences), 64)])
    skipped = encoded / "skipped.txt"
    lines = read_lines(skipped, errors="surrogateescape") if skipped.is_file() else []
    rows = [i for i, file in enumerate(files) if not any(line.startswith(f"{file}: ") for line in lines)]
    # Half precision leaves embeddings slightly off unit norm.
    images = F.normalize(embeddings[rows], dim=1)
    return write_index(weights, build_index(images, [_name(files[i], data) for i in rows], texts.clone()))


def _name(path: Path, data: Path) -> str:
    return printable(path.relative_to(data).as_posix() if path.is_relative_to(data) else path.name)


@entry_point()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="folder of weights that gets the index")
    parser.add_argument("--encoded", type=Path, required=True, help="embeddings of the images that stage 2 trained on")
    parser.add_argument("--data", required=True, help="those images, as they were given to stage 2")
    parser.add_argument("--prompts", type=Path, required=True, help="sentences about such images, one a line")
    args = parser.parse_args()
    try:
        path = add_index(args.weights, args.encoded, args.data, args.prompts)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
