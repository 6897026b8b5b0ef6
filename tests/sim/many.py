"""Many seeds in several processes."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from types import FrameType

import torch

from tests.sim.run import Outcome, run_seed

SEED_SECONDS = 60.0  # of the real clock: beyond it a task spins without any time passing


def open_pool(jobs: int) -> ProcessPoolExecutor:
    """So many processes to run seeds in; a context manager."""
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    return ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(1,))


def run_many(seeds: Sequence[int], pool: ProcessPoolExecutor) -> Iterator[Outcome]:
    """The outcomes, in the order of the seeds."""
    return pool.map(run_in_time, seeds)


def run_in_time(seed: int) -> Outcome:
    """The outcome of one seed, in the main thread.  Raises TimeoutError after SEED_SECONDS."""

    def too_long(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"a busy loop, or {SEED_SECONDS:g} s were not enough")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, SEED_SECONDS)
    try:
        return run_seed(seed)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
