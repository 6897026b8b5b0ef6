"""Rotary positions (arXiv:2104.09864) of a model's config: the known kinds, and the kinds whose angles
depend on the sequence's length.  No torch.

Two kinds depend on the length.  `longrope` (arXiv:2402.13753) has one set of factors for sequences up to
the trained length and one for longer ones; `dynamic` (NTK scaling) stretches its base with every position
beyond it.  The library takes the length of the positions in one call.  Here a position has a length of its
own: the length of its prompt, or for a generated token the length of the sequence up to the token.  So the
angles depend neither on the batch nor on the number of steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from node.config import ConfigError

_NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "proportional": (),
}
_LISTS = ("short_factor", "long_factor")
_RENAMED = {("phi3", "yarn"): "longrope"}  # as the library reads it
_WITHOUT = frozenset({"gpt2", "opt", "bloom", "mpt", "gptj"})  # other positions, or angles without settings
_RECOMPUTED = frozenset({"phi3"})  # the library fills the cache anew where the factors change


@dataclass(frozen=True, slots=True)
class LengthRope:
    """Angles that depend on the length.

    rules: (kind, longest sequence with plain angles), one for each kind of block.
    recomputed: when a growing sequence changes its factors, the library computes all of its positions once
    more; else cached positions keep the old factors.
    """

    rules: tuple[tuple[str, int], ...]
    recomputed: bool = False

    def factors(self, length: int) -> tuple[int, ...]:
        """The key of the angles: equal for two lengths with the same angles."""
        return tuple(
            int(length > plain) if kind == "longrope" else max(length, plain) for kind, plain in self.rules
        )

    def same(self, one: int, other: int) -> bool:
        """Whether sequences of these two lengths have the same angles."""
        return one == other or self.factors(one) == self.factors(other)

    def length_of(self, prompt: int, tokens: int) -> int:
        """The length for the angles of the first of `tokens` positions; `prompt` of them are the prompt."""
        return tokens if self.recomputed else prompt


def length_rope(config: Any) -> LengthRope | None:  # Any: the library's config, which is not typed
    """The angles that depend on the length for this config of the library; None if none do."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, Mapping):
        return None
    rules = []
    for one in _by_type(parameters):
        kind = one.get("rope_type")
        if kind == "longrope":
            rules.append((kind, int(one["original_max_position_embeddings"])))
        elif kind == "dynamic":
            rules.append((kind, int(config.max_position_embeddings)))
    if not rules:
        return None
    return LengthRope(tuple(rules), getattr(config, "model_type", None) in _RECOMPUTED)


def check_rope(config: Mapping[str, Any], path: Path) -> None:
    """Refuse rotary settings that the library cannot follow.  config: a config.json; path: of that file.

    Raises ConfigError, which names the setting.
    """
    if config.get("model_type") in _WITHOUT:
        return
    for where, one in _settings(config, path):
        kind = one.get("rope_type", one.get("type", "default"))
        kind = _RENAMED.get((str(config.get("model_type")), str(kind)), kind)
        if not isinstance(kind, str) or kind not in _NEEDED:
            was = " (longrope had that name once)" if kind == "su" else ""
            raise ConfigError(f"{path}: {where} has the type {kind!r}{was}; known are {', '.join(_NEEDED)}")
        for name in _NEEDED[kind]:
            if name not in one:
                raise ConfigError(f"{path}: {where} of type {kind} has no {name}")
            if kind == "yarn" and one[name] is None:
                continue  # the comparison of the two lengths is meant
            _check_factor(one[name], f"{path}: {name} of {where}", many=name in _LISTS)
        if kind == "longrope":
            _check_lists(config, one, f"{path}: {where}")


def stretched(config: Mapping[str, Any], positions: int) -> int:
    """The number of positions that a model may have if its config.json says `positions`.

    `dynamic` begins after these positions, and its factor multiplies their number.
    """
    settings = config.get("rope_scaling") or config.get("rope_parameters")
    if config.get("model_type") in _WITHOUT or not isinstance(settings, Mapping):
        return positions
    factors = [
        one["factor"]
        for one in _by_type(settings)
        if one.get("rope_type", one.get("type")) == "dynamic" and _is_number(one.get("factor"))
    ]
    return max(positions, int(positions * max(factors, default=1)))


def _settings(config: Mapping[str, Any], path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The settings that the library would read, by name: one set, or one for each type of block."""
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    settings = config.get(name)
    if settings is None:
        return
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{path}: {name} is {settings!r}, an object with a rope_type is expected")
    for one in _by_type(settings):
        yield name, one


def _by_type(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The settings of each type of block, where the types differ."""
    return [one for one in settings.values() if isinstance(one, Mapping)] or [settings]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _check_factor(value: object, what: str, *, many: bool) -> None:
    if many and isinstance(value, list) and value and all(map(_is_number, value)):
        return
    if not many and _is_number(value):
        return
    allowed = "a list of numbers above 0" if many else "a number above 0"
    shown = repr(value)
    raise ConfigError(f"{what} is {shown if len(shown) < 60 else shown[:56] + '...'}, {allowed} is expected")


def _check_lists(config: Mapping[str, Any], one: Mapping[str, Any], what: str) -> None:
    """Each rotary pair has a factor of its own."""
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    dimensions = config.get("head_dim")
    if dimensions is None and isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        dimensions = hidden // heads
    share = one.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if not isinstance(dimensions, int) or not _is_number(share):
        return
    pairs = -(-int(dimensions * share) // 2)
    for name in _LISTS:
        if len(one[name]) != pairs:
            raise ConfigError(f"{what} has {len(one[name])} values as {name}, the model has {pairs} pairs")
