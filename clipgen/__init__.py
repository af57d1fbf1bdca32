"""Language-free text-to-image: a CLIP embedding becomes VQGAN tokens, the tokens become images, CLIP picks the best."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from clipgen.utils.cpu import choose_wait_policy

if TYPE_CHECKING:
    from clipgen.errors import ClipGenError
    from clipgen.pipeline import ClipGen
    from clipgen.request import GenerationOutput, GenerationRequest, SamplingParams

__version__ = "0.1.0"
__all__ = ["ClipGen", "ClipGenError", "GenerationOutput", "GenerationRequest", "SamplingParams"]

_EXPORTS = {
    "ClipGen": ("clipgen.pipeline", "ClipGen"),
    "ClipGenError": ("clipgen.errors", "ClipGenError"),
    "GenerationOutput": ("clipgen.request", "GenerationOutput"),
    "GenerationRequest": ("clipgen.request", "GenerationRequest"),
    "SamplingParams": ("clipgen.request", "SamplingParams"),
    "Request": ("clipgen.request", "GenerationRequest"),  # former names
    "Result": ("clipgen.request", "GenerationOutput"),
}


# The one thing that importing clipgen does: OpenMP reads this setting when PyTorch is imported, and never again.
choose_wait_policy()


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds: `--help` and the configurations do without it.
    if name in _EXPORTS:
        module, attribute = _EXPORTS[name]
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
