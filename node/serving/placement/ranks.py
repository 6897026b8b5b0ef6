"""The placement of a node for as long as it runs: its devices, and the processes that divide its blocks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import trio

from node.config import ConfigError
from node.runtime.compute_thread import Runner
from node.serving.placement.placement import Placement

if TYPE_CHECKING:
    from node.model.checkpoint.folder import ModelFolder
    from node.model.parallel.shard import Shard
    from node.model.parallel.team import Team

CLOSE_SECONDS = 30.0  # a process that is asked to end is killed after 5


@asynccontextmanager
async def open_placement(
    devices: tuple[str, ...],
    folder: ModelFolder,
    compute: Runner,
    *,
    ranks: int = 1,
    threads: int = 1,
    on_lost: Callable[[str], None] = lambda _: None,
) -> AsyncIterator[Placement]:
    """The placement for the time of the block; at its end the ranks' processes are ended.

    devices: as many as `ranks`, where each block is divided.  threads: of torch, in each rank.
    on_lost: called once in trio's thread, with the reason why the ranks cannot compute any more.
    Raises ConfigError: the model cannot be divided so, or a process does not start.
    """
    if ranks == 1:
        yield Placement(devices)
        return
    token = trio.lowlevel.current_trio_token()

    def lost(why: str) -> None:
        with suppress(trio.RunFinishedError):  # the node has ended meanwhile
            token.run_sync_soon(on_lost, why)

    shard = await compute.run(_shard_of, folder, ranks)
    team = await compute.run(_open_team, devices, threads, lost)
    first, last = shard.own_key_heads
    try:
        yield Placement(devices, team, (last - first) / shard.key_heads)
    finally:
        # In another thread: the torch thread may wait for a rank, and goes on when that has ended.
        with trio.CancelScope(shield=True), trio.move_on_after(CLOSE_SECONDS):
            await trio.to_thread.run_sync(team.close, abandon_on_cancel=True)


def _shard_of(folder: ModelFolder, ranks: int) -> Shard:
    """Rank 0's part, before any process is started.  Raises ConfigError.  Runs in the torch thread."""
    from node.model.blocks.span import library_class, library_config
    from node.model.checkpoint.architecture import architecture_of
    from node.model.parallel.shard import Shard

    architecture = architecture_of(folder.config.get("model_type"))
    config = library_config(library_class(architecture, architecture.base), folder)
    try:
        return Shard.of(config, ranks, 0)
    except ConfigError as error:
        raise ConfigError(f"--tensor-parallel {ranks}: {error}") from None


def _open_team(devices: tuple[str, ...], threads: int, on_lost: Callable[[str], None]) -> Team:
    from node.model.parallel.team import open_team

    return open_team(devices, threads=threads, on_lost=on_lost)
