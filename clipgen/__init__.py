"""Language-free text-to-image: a CLIP embedding becomes VQGAN tokens, the tokens become images, CLIP picks the best."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipgen.pipeline import ClipGen
    from clipgen.request import GenerationOutput, GenerationRequest

__version__ = "0.1.0"
__all__ = ["ClipGen", "GenerationOutput", "GenerationRequest"]


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds: `--help` and the configurations do without it.
    if name in __all__:
        module = import_module("clipgen.pipeline" if name == "ClipGen" else "clipgen.request")
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
