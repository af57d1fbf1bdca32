"""The training index, computed and written beside the weights; `clipgen.weights.training_index` reads it.

Shapes: N images, D embedding, M measured sentences.
"""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgen.weights.model_dir import MANIFEST, VERSION, fingerprint, read_manifest
from clipgen.weights.tensor_file import write_tensors
from clipgen.weights.training_index import FILE, NUM_NEAREST

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
