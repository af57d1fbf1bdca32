"""CapS: how likely a captioner finds the prompt, given the image (Wang et al., arXiv 2203.00386, after CogView's).

The captioner is a model of `transformers` that continues an image with text, such as BLIP or GIT, in a local folder;
nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from clipgen.errors import WeightsError
from clipgen.utils.text import first_line


class Captioner:
    """Likelihoods of texts given images."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Load a folder that `save_pretrained` of a model and of its processor wrote.

        Raises:
            WeightsError: `transformers` is not installed, or the folder holds no model that it can load.
        """
        if not folder.is_dir():
            raise WeightsError(f"no captioner in {folder}: no such folder")
        try:
            from transformers import AutoModelForImageTextToText, AutoProcessor
        except ImportError as error:
            raise WeightsError("a captioner needs transformers; install requirements-dev.txt") from error
        try:
            local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
            self.processor: Any = AutoProcessor.from_pretrained(folder, **local)
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                folder, **local, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
            model, loading = loaded
            if missing := sorted(loading["missing_keys"]):  # transformers would make them up
                raise ValueError(f"model.safetensors lacks {len(missing)} tensors, such as {missing[0]}")
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            raise WeightsError(
                f"{folder} holds no captioner ({first_line(error)}); it needs config.json, "
                "model.safetensors and the files of its processor, as of BLIP or GIT"
            ) from error
        self.model = model.to(device).eval()
        self.device = device

    @torch.inference_mode()
    def likelihoods(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """CapS of each pair, (N,) in (0, 1]: the geometric mean of the probabilities of the text's tokens.

        The start token is given and does not count; the end token counts.
        """
        inputs = self.processor(
            images=list(images), text=list(texts), return_tensors="pt", padding=True, truncation=True
        ).to(self.device)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        logits = self.model(pixel_values=inputs["pixel_values"], input_ids=ids, attention_mask=mask).logits
        # GIT's sequence begins with the image: the last positions are the text's.
        log_p = logits[:, -ids.shape[1] :].float().log_softmax(-1)[:, :-1]
        kept = mask[:, 1:].cpu().double()  # Apple's GPUs have no float64
        found = log_p.gather(2, ids[:, 1:, None]).squeeze(2).cpu().double() * kept
        return (found.sum(1) / kept.sum(1)).exp()
