"""Resolved configurations for tests, which have settings and no data."""

from megatron_scalebio.config import Config, load_config
from megatron_scalebio.resolution import resolve

BYTES = 258  # ids of the bytes tokenizer


def resolved(*overrides: str, path: str | None = None, vocab_size: int = BYTES) -> Config:
    """The configuration of these settings, as `open_run` would resolve it."""
    return resolve(load_config(path, list(overrides)), vocab_size)
