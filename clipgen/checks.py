"""Checks of settings: a value that cannot work is refused with its name, what it is and what is allowed."""

from __future__ import annotations

import math


class ConfigError(ValueError):
    """A configuration that cannot work; the message names the field, its value and what is allowed."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_sizes(config: object, *names: str, at_least: int = 1, section: str = "") -> None:
    """Refuse whole numbers below `at_least`."""
    for name in names:
        value = getattr(config, name)
        require(value >= at_least, f"{section}{name} is {value}; it must be at least {at_least}")


def require_weights(config: object, *names: str, section: str = "") -> None:
    """Refuse numbers that are negative or not finite."""
    for name in names:
        value = getattr(config, name)
        require(math.isfinite(value) and value >= 0, f"{section}{name} is {value}; it must be 0 or a positive number")


def require_choice(config: object, name: str, *allowed: str) -> None:
    """Refuse what is none of the allowed words."""
    value = getattr(config, name)
    require(value in allowed, f"{name} is {value!r}; use {', '.join(allowed[:-1])} or {allowed[-1]}")
