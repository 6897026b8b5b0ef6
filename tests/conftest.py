"""Fixtures of tests of several directories."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import ExitStack

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in child processes

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings

from node.model.checkpoint.folder import ModelFolder
from node.model.checkpoint.source import cache_dir, resolve
from tests.model_fixtures import save_tiny, save_tiny_tokenizer
from tests.processes import ROOT, children, end, python

gc.disable()  # until all is collected: of the million objects that imports and tests make, most stay
for _name in [name for name in os.environ if name.startswith("RACEME_") and name != "RACEME_CACHE"]:
    del os.environ[_name]  # flags of a developer's own swarm
# Nodes whose tests have caches of models of their own read the kernels that are there.
os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_dir() / "kernels"))

# Of other packages: `make test-ecosystem` and `make test-conformance` have environments with them.
collect_ignore = [] if find_spec("peft") and find_spec("lm_eval") else ["ecosystem"]
collect_ignore += [] if find_spec("openai") and find_spec("schemathesis") else ["conformance"]

settings.register_profile("raceme", deadline=None)  # a busy machine is no bug
settings.register_profile(  # of `make mutants`: one answer for each change, and no search for small examples
    "mutants",
    settings.get_profile("raceme"),
    max_examples=40,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
)
settings.load_profile("raceme")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Before the workers start, one process compiles the kernels that all of them and their nodes use.

    In a new clone another one compiles the tests meanwhile, which else each worker would do by itself.
    """
    config = session.config
    if not getattr(config.option, "numprocesses", None) or hasattr(config, "workerinput"):
        return
    modules: list[tuple[str, ...]] = [("node.model.weights.precompile",)]
    if not (sys.dont_write_bytecode or any(Path(__file__).parent.glob("unit/__pycache__/*-pytest-*"))):
        modules.append(("pytest", "--collect-only", "-qq", "-p", "no:cacheprovider"))
    with ExitStack() as stack:
        started = [
            stack.enter_context(subprocess.Popen(python(*words), cwd=ROOT, stdout=subprocess.DEVNULL))
            for words in modules
        ]
        for process in started:
            stack.callback(process.kill)
        codes = [process.wait(COMPILE_SECONDS) for process in started]
    if codes[0]:  # a test that cannot be collected is told by the workers
        raise subprocess.CalledProcessError(codes[0], python(*modules[0]))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What was imported and collected stays: no later collection of garbage visits it."""
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:  # Any: pytest-xdist's own types
    """Each file goes to the next free worker, in the order of `ORDER`; tests/fault is as two equal files.

    A file stays together: the models that its fixtures write are written once.  So does tests/lab: the
    process from which its nodes are forked starts once.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ProcessesInTwoWorkers(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if file.startswith("tests/fault/"):
                return f"processes {Path(file).stem in HALF}"
            if file.startswith("tests/lab/"):
                return "lab"
            return file

    config.option.loadscopereorder = False  # newer versions would begin with the files of many tests
    return ProcessesInTwoWorkers(config, log)


COMPILE_SECONDS = 300.0  # half a minute on two idle cores
# Half of the time of tests/fault.
HALF = {"test_recovery", "test_gateway_disconnects", "test_gateway_process", "test_adapter_steps"}
ORDER = ("tests/fault/", "tests/lab/", "tests/sim/", "tests/model/", "tests/io/", "tests/unit/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files come first: the last files, which are short, let all workers end together."""
    items.sort(key=lambda item: next((n for n, at in enumerate(ORDER) if item.nodeid.startswith(at)), -1))


@pytest.fixture(autouse=True, scope="module")
def frozen_libraries() -> None:
    """The libraries' million objects stay: each later collection of garbage would visit them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def one_thread_of_torch() -> None:
    """Each module begins with one, whatever nodes another module had in this process."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def no_process_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """A module ends its processes: one that is left is killed, and fails the module's last test.

    Not a check of each test: a swarm of the whole module starts its killed servers again between tests.
    """
    tests = [item for item in request.session.items if item.nodeid.startswith(f"{request.node.nodeid}::")]
    if not any(item.get_closest_marker("process") for item in tests):
        yield
        return
    before = children()
    yield
    left = end(children() - before)
    assert not left, f"left running: {left}"


@pytest.fixture(scope="session")
def builtin_model() -> ModelFolder:
    """The built-in model, fetched into the user's cache by the first run."""
    return resolve(cache_dir=cache_dir())


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of six blocks with a tokenizer of single characters."""
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    save_tiny("llama", path)
    save_tiny_tokenizer(path)
    return path
