"""Language-free text-to-image: a CLIP embedding becomes VQGAN tokens, the tokens become images, CLIP picks the best."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipgen.pipeline import ClipGen, Request, Result

__version__ = "0.1.0"
__all__ = ["ClipGen", "Request", "Result"]


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds: `--help` and the configurations do without it.
    if name in __all__:
        from clipgen import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
