"""A `Config` as it was given; what is none is refused with the line to write."""

from __future__ import annotations

from .config import Config
from .presets import PRESETS


def config_given(config: object) -> Config:
    """``config``, or the default one for ``None``.

    Raises:
        TypeError: with the line to write, for a preset's name and for a dict of fields.
    """
    if config is None:
        return Config()
    if isinstance(config, Config):
        return config
    line = "nm.Config(...)"
    if isinstance(config, str) and config in PRESETS:
        line = f"nm.Config.preset({config!r})"
    elif isinstance(config, dict):
        line = f"nm.Config({', '.join(f'{key}={value!r}' for key, value in config.items())})"
    raise TypeError(f"config: expected a Config, got {type(config).__name__}; write {line}")
