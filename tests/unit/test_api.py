"""One interface for trio, asyncio and blocking programs: their methods and arguments cannot drift apart."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

import client
from client.api import SessionLike, SwarmLike, SyncSession, SyncSwarm
from client.bridges.proxy import Proxy, proxy_class
from client.bridges.sync import SwarmHandle
from client.session.session import Session
from client.swarm import Swarm

PAIRS = ((SwarmLike, SyncSwarm), (SessionLike, SyncSession))
OWN = {SyncSwarm: {"close", "run"}}  # an awaited one is left by its `async with`, and awaits by itself


def members(interface: type) -> dict[str, Any]:
    """The public members that an interface or a class declares, those of its bases included."""
    found: dict[str, Any] = {}
    for owner in reversed(interface.__mro__):
        found |= {name: each for name, each in vars(owner).items() if not name.startswith("_")}
    return found


def blocking(annotation: str) -> str:
    """What a blocking method returns in place of an awaited one."""
    annotation = re.sub(r"\bAsyncGenerator\[(\w+), None\]", r"Generator[\1, None, None]", annotation)
    annotation = annotation.replace("AbstractAsyncContextManager[", "AbstractContextManager[")
    return annotation.replace("SessionLike", "SyncSession")


def parameters(function: Any) -> list[tuple[object, ...]]:
    return [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize(("awaited", "sync"), PAIRS, ids=["swarm", "session"])
def test_a_blocking_handle_has_the_members_of_the_awaited_one_signature_by_signature(awaited, sync):
    ours, theirs = members(sync), members(awaited)
    assert set(ours) - OWN.get(sync, set()) == set(theirs)
    for name, declared in theirs.items():
        if isinstance(declared, property):
            assert ours[name].fget.__annotations__ == declared.fget.__annotations__, name
            continue
        assert not inspect.iscoroutinefunction(ours[name])
        expected, found = inspect.signature(declared), inspect.signature(ours[name])
        assert list(found.parameters.values()) == list(expected.parameters.values()), name
        assert found.return_annotation == blocking(expected.return_annotation), name


@pytest.mark.parametrize(("interface", "real"), [(SwarmLike, Swarm), (SessionLike, Session)])
def test_the_real_one_has_what_the_interface_says(interface, real):
    for name, declared in members(interface).items():
        if isinstance(declared, property):
            assert hasattr(real, name) or name in real.__annotations__, name
            continue
        assert inspect.iscoroutinefunction(getattr(real, name)) == inspect.iscoroutinefunction(declared), name
        ours, theirs = parameters(getattr(real, name)), parameters(declared)
        assert ours[: len(theirs)] == theirs, name  # `Session.step` has one of its own besides


@pytest.mark.parametrize(
    ("interface", "base"),
    [(SwarmLike, Proxy), (SyncSwarm, SwarmHandle), (SessionLike, Proxy), (SyncSession, Proxy)],
)
def test_a_proxy_has_the_members_of_its_interface_with_their_signatures(interface, base):
    made = proxy_class(interface, base)
    for name, declared in members(interface).items():
        if not isinstance(declared, property) and name not in OWN.get(interface, set()):
            assert parameters(getattr(made, name)) == parameters(declared)
            assert getattr(made, name).__doc__ == declared.__doc__


def test_connect_and_connect_sync_take_the_same_arguments():
    ours, theirs = inspect.signature(client.connect_sync), inspect.signature(client.connect)
    assert list(ours.parameters.values()) == list(theirs.parameters.values())
    assert (theirs.return_annotation, ours.return_annotation) == (
        "AbstractAsyncContextManager[SwarmLike]",
        "SyncSwarm",
    )
