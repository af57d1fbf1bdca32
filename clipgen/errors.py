"""What can go wrong, by what the user can do about it. Every message is one line that says what to change."""

from __future__ import annotations


class ClipGenError(ValueError):
    """A mistake or a circumstance that the user can change; shown as one line, never as a traceback."""


class RequestError(ClipGenError):
    """A value of a request that is not allowed: change that field. The message names field, value and range."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}")
        self.field = field


class ConfigError(ClipGenError):
    """A configuration that cannot work: change the named setting."""


class WeightsError(ClipGenError):
    """Weights that are missing, damaged or of another model: fetch, convert or train them again."""


class DataError(ClipGenError):
    """An image, URL, receipt or data set that cannot be used: give another one."""


class OutputError(ClipGenError):
    """A file or folder that cannot be written or continued: give another one or make room."""


class DownloadError(ClipGenError):
    """A file that cannot be fetched: check the network or fetch it by hand."""


class UnavailableError(ClipGenError):
    """An address that no server can listen on: give another host or port."""


class InsufficientMemoryError(ClipGenError):
    """Not even one image fits into memory: take a smaller model, a lower precision or another device."""


class EngineError(RuntimeError):
    """Failure of a decoding step that no user can fix; `__cause__` is the original error."""


class Cancelled(Exception):
    """Canceled generation; its results are discarded."""
