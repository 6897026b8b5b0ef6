"""The progress of a long job with files, and a bar that shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TextIO, cast

from node.runtime.console import QuietText, one_line

Progress = Callable[[str, int, int], None]
"""Called with the name of the job, bytes done, and bytes in all (0 where unknown)."""


def silent(what: str, done: int, total: int) -> None:
    """Shows nothing."""


@contextmanager
def progress_bar(file: TextIO) -> Iterator[Progress]:
    """A bar on `file`, one line for each job; without a terminal one plain line for each job.

    The bar appears with the first call, so a command that needs no download prints nothing.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    quiet = cast("IO[str]", QuietText(file))
    console = Console(file=quiet, markup=False, emoji=False, highlight=False)
    what = TextColumn("{task.description}", markup=False)
    columns = (what, BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Bar(*columns, console=console)
    tasks: dict[str, TaskID] = {}

    def show(what: str, done: int, total: int) -> None:
        if what not in tasks:
            if console.is_terminal:
                bar.start()
            else:
                console.print(one_line(what))
            tasks[what] = bar.add_task(one_line(what), total=total or None)
        bar.update(tasks[what], completed=done, total=total or None)

    try:
        yield show
    finally:
        if console.is_terminal and tasks:
            bar.stop()
