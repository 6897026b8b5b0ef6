"""Which functions of ours are called, and by which: a profiler's hook that takes them down."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from inspect import CO_COROUTINE
from pathlib import Path
from types import CodeType, FrameType

_TASKS = "unrolled_run"  # the function in which trio runs every task
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("tensor_codec", "routing", "node", "client")


@dataclass(frozen=True, slots=True)
class Called:
    """A function of ours was entered, or, where it is a coroutine, went on.

    module: its file, from the root on.  name: as Python qualifies it.  caller: the nearest function of
    ours below it on the stack, as (module, name); None at the bottom.  root: the name of the function of
    ours at the bottom: what the task or the thread runs.
    """

    module: str
    name: str
    is_coroutine: bool
    caller: tuple[str, str] | None
    root: str


class Tracer:
    """Takes down what the threads call in which `start` was called, until `stop` is called there."""

    def __init__(self) -> None:
        self.calls: list[Called] = []
        self._before: Callable[..., object] | None = None
        self._modules: dict[CodeType, str | None] = {}

    def start(self) -> None:
        """From now on, in this thread."""
        sys.setprofile(self._hook)

    def stop(self) -> None:
        """No more, in this thread."""
        sys.setprofile(None)

    def _hook(self, frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or (module := self._module(frame.f_code)) is None:
            return
        code, caller, root = frame.f_code, None, frame.f_code.co_qualname
        below = frame.f_back
        while below is not None and below.f_code.co_name != _TASKS:
            if (below_module := self._module(below.f_code)) is not None:
                root = below.f_code.co_qualname
                caller = caller or (below_module, root)
            below = below.f_back
        is_coroutine = bool(code.co_flags & CO_COROUTINE)
        self.calls.append(Called(module, code.co_qualname, is_coroutine, caller, root))

    def _module(self, code: CodeType) -> str | None:
        if code not in self._modules:
            path = Path(code.co_filename)
            ours = path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in PACKAGES
            self._modules[code] = str(path.relative_to(ROOT)) if ours else None
        return self._modules[code]
