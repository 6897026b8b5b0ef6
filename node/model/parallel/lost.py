"""The error of a span whose ranks cannot compute any more; importable without torch.distributed."""

from __future__ import annotations

from node.config import ConfigError


class SpanLost(ConfigError):
    """A rank is gone or out of step: the span cannot compute any more."""
