"""One proxy for every handle: each member of an interface crosses a portal by its kind.

An interface is a protocol of `client.api`.  The type of a member's result decides the crossing: a coroutine
is a call in trio, a generator is a queue, a context manager is held open, and any other value is returned
directly.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from functools import cache, partial, wraps
from typing import Any, cast

from client.bridges.trio_thread import Portal


class Proxy:
    """Stands for an object in trio's thread, with the members of one interface.  Made by `proxy_of`."""

    def __init__(self, target: Any, portal: Portal, handles: Mapping[str, type]) -> None:
        """target: the object.  handles: the interface of a method's result, by the method's name."""
        self._target = target
        self._portal = portal
        self._handles = handles

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._target!r}>"

    def __deepcopy__(self, memo: object) -> Proxy:
        return self  # a copy of a model that holds a handle keeps it

    def __reduce__(self) -> Any:
        raise TypeError(f"{self!r} cannot be pickled: a swarm belongs to its process")

    def _call(self, name: str, *args: Any, **arguments: Any) -> Any:  # Any, here and below: passed through
        method = getattr(self._target, name)
        args = tuple(_unwrapped(each) for each in args)
        arguments = {key: _unwrapped(each) for key, each in arguments.items()}
        if inspect.iscoroutinefunction(method):
            function = partial(method, *args, **arguments)
            if name not in self._handles:
                return self._portal.call(function)
            return self._portal.call(partial(self._opened, name, function), _close)
        # A call that gives a generator or a context manager only checks; trio's part comes with its use.
        found = method(*args, **arguments)
        if isinstance(found, AsyncGenerator):
            return self._portal.iterate(found)
        if isinstance(found, AbstractAsyncContextManager):
            return self._portal.hold(found, partial(self._wrapped, name))
        return self._wrapped(name, found)

    async def _opened(self, name: str, function: Callable[[], Awaitable[Any]]) -> Any:
        """Runs in trio: a proxy of what the function opens."""
        return self._wrapped(name, await function())

    def _wrapped(self, name: str, found: Any) -> Any:
        interface = self._handles.get(name)
        return found if interface is None else proxy_of(found, interface, self._portal, self._handles)


def proxy_of(
    target: Any, interface: type, portal: Portal, handles: Mapping[str, type], base: type[Proxy] = Proxy
) -> Any:  # Any: a value of type `interface`
    """An object with the members of `interface` that stands for `target`."""
    made = proxy_class(interface, cast(Any, base))  # Any: mypy holds it for unhashable
    return made(target, portal, handles)


@cache
def proxy_class(interface: type, base: type[Proxy]) -> type[Proxy]:
    """The class of the proxies for an interface; members that `base` has are its own."""
    members: dict[str, Any] = {}
    for owner in reversed(interface.__mro__):
        if getattr(owner, "_is_protocol", False):
            public = {name: member for name, member in vars(owner).items() if not name.startswith("_")}
            members |= {name: _member(name, member) for name, member in public.items()}
    members = {name: member for name, member in members.items() if not hasattr(base, name)}
    return type(f"{interface.__name__}Proxy", (base,), {"__doc__": interface.__doc__, **members})


def _member(name: str, declared: Any) -> Any:
    if isinstance(declared, property):
        return property(lambda self: getattr(self._target, name), doc=declared.__doc__)
    special = _SPECIAL.get(name)

    @wraps(declared)
    def member(self: Proxy, *args: Any, **arguments: Any) -> Any:
        return special(self) if special is not None else self._call(name, *args, **arguments)

    return member


def _view(proxy: Proxy) -> Any:
    return proxy._target.last_view  # `view` itself is for trio's thread


def _close(proxy: Proxy) -> None:
    proxy._portal.soon(proxy._target.close)  # returns at once


_SPECIAL: dict[str, Callable[[Proxy], Any]] = {"view": _view, "close": _close}


def _unwrapped(value: Any) -> Any:
    return value._target if isinstance(value, Proxy) else value


def target_of(handle: Any) -> Any:
    """The object in trio's thread for which a proxy stands; any other object itself."""
    return _unwrapped(handle)
