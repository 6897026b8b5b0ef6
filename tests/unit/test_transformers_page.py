"""The pages about transformers and training say what is so: tests, errors and calls in them exist."""

from __future__ import annotations

import ast
import inspect
import re
from functools import cache
from typing import Any

import pytest

import client.hf as hf
from client.api import SyncSwarm
from client.hf.blocks import InferenceSession, RemoteSequential
from client.hf.generation import RemoteGeneration
from client.swarm import Swarm
from tests.markdown import ROOT, page, table

PAGES = ("docs/transformers.md", "docs/training.md")
BY_DESIGN = re.compile(
    r"(?:^|; )(by design: [^;]{10,}|(?:adapters|tensor parallelism): not there yet)(?:;|$)"
)
NAMED_TEST = re.compile(r"(tests/\w+/\w+\.py)::(\w+)")
SNIPPETS = [
    snippet
    for name in PAGES
    for snippet in re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
]


@cache
def names_in(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {node.name for node in found if node.name.startswith("test_")}


def test_each_function_of_petals_tests_has_a_row_with_a_test_or_a_reason():
    rows = table(page(PAGES[0]), "## The tests of Petals")
    assert len(rows) == 29
    assert len({row[0] for row in rows}) == len(rows)
    for what, checks, here in rows:
        assert len(checks.split()) >= 3, what
        assert NAMED_TEST.search(here) or BY_DESIGN.search(here), f"{what}: neither a test nor a reason"


@pytest.mark.parametrize("name", PAGES)
def test_every_test_that_a_page_names_exists(name: str):
    named = NAMED_TEST.findall(page(name))
    assert named or name != PAGES[0]
    for path, test in named:
        assert test in names_in(path), f"{path} has no {test}"


def test_every_error_of_the_page_is_one_of_the_code():
    code = "".join(path.read_text() for path in sorted((ROOT / "client" / "hf").glob("*.py")))
    joined = re.sub(r'"\s*\n\s*f?"', "", code)  # a text that goes on in the next line
    rows = table(page(PAGES[0]), "## What differs, and the error that says so")
    assert len(rows) >= 10
    for call, kind, said in rows:
        assert re.search(rf"raise {kind}\([^#]*{re.escape(said)}", joined), f"{call}: {said}"


CALLS: dict[str, Any] = {
    "from_swarm": hf.from_swarm,
    "RemoteCache": hf.RemoteCache,
    "model.inference_session": RemoteGeneration.inference_session,
    "model.generate": RemoteGeneration.generate,
    "cache.crop": hf.RemoteCache.crop,
    "cache.close": hf.RemoteCache.close,
    "swarm.forward": Swarm.forward,
    "swarm.forward_kept": Swarm.forward_kept,
    "swarm.backward": Swarm.backward,
    "AutoDistributedModelForCausalLM.from_pretrained": hf.AutoDistributedModelForCausalLM.from_pretrained,
}


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_calls_in_the_snippets_fit_the_functions_that_they_call(snippet: str):
    tree = ast.parse(snippet)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "client.hf":
            assert {each.name for each in node.names} <= set(hf.__all__)
        if isinstance(node, ast.Call) and (function := CALLS.get(ast.unparse(node.func))) is not None:
            itself = [] if inspect.isclass(function) or inspect.ismethod(function) else ["self"]
            itself = itself if "." in ast.unparse(node.func) else []
            given = [*itself, *node.args]
            inspect.signature(function).bind(*given, **{word.arg: None for word in node.keywords if word.arg})


def test_what_the_pages_say_of_a_model_and_a_swarm_is_there():
    text = " ".join(page(name) for name in PAGES)
    for name in set(re.findall(r"`swarm\.(\w+)\(", text)):
        assert callable(getattr(SyncSwarm, name, None) or getattr(Swarm, name)), name
    for name in re.findall(r"model\.blocks(?:\[\w+:\w+\])?\.(\w+)", text):
        assert hasattr(RemoteSequential, name), name
    assert set(re.findall(r"\bsession\.(\w+) =", text)) <= set(vars(InferenceSession))
    classes = set(re.findall(r"AutoDistributedModel(?:For\w+)?", text))
    assert classes == {name for name in hf.__all__ if name.startswith("Auto")}
