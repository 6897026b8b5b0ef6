"""The structure of the code within bounds; each exception stands here with its reason."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from client.session.core import NEXT

ROOT = Path(__file__).resolve().parents[2]
MAX_FUNCTION_LINES, MAX_FOLDER = 70, 12

MANY_METHODS = {
    "node.network.transport.yamux.Yamux": "one state machine, a method for each rule of the protocol",
    "node.model.weights.kernels._Tile": "the instructions of one tile, which only make sense together",
    "client.hf.cache.RemoteCache": "the methods that transformers asks of a Cache",
    "client.swarm.Swarm": "a method for each thing that a program asks of a swarm",
    "node.serving.server.Server": "one lifecycle: load, announce, serve, move, drain",
}
MANY_FIELDS = {
    "client.swarm.Swarm": "the parts that one handle joins",
    "tensor_codec.limits.Limits": "a value: every limit in one place",
    "client.config.ClientConfig": "a value: a client's choices by their names",
    "node.config.NodeConfig": "a value: an operator's choices by their names",
    "client.generation.options.GenerateArguments": "a value: transformers' options by their names",
    "client.generation.options.SamplingOptions": "a value: transformers' options by their names",
    "client.gateway.openai.responses.request.ResponseRequest": "a value: OpenAI's fields by their names",
    "routing.view.records.Record": "a value: the record on the wire",
    "tensor_codec.messages.info.PeerInfo": "a value: a server's state on the wire",
    "node.model.llama.config.LlamaConfig": "a value: transformers' settings by their names",
    "node.config.NetworkConfig": "a value: the flags of the network, by name",
}
MANY_PARAMETERS = {
    "client.config.client_config": "the arguments of `client.connect`, by name",
    "client.swarm.Swarm.open_chain": "a session as its openers know it, by name",
    "client.hf.auto": "the arguments that transformers and Petals have, by name",
    "node.model.weights.kernels": "compiled: numba and LLVM take flat arguments",
    "node.model.attention": "compiled: numba and LLVM take flat arguments",
    "node.model.weights.decode_kernels": "compiled: numba and LLVM take flat arguments",
    "node.serving.executor.engine.Engine.step": "a step as its session knows it, by name",
    "node.model.cuda": "operations of torch and kernels: they take flat arguments",
    "node.model.weights.panels": "compiled: numba and LLVM take flat arguments",
    "node.model.weights.low_rank_kernel": "compiled: numba and LLVM take flat arguments",
}


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("architecture", ROOT / "scripts" / "architecture.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["architecture"] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


SCRIPT = load()


@pytest.fixture(scope="module")
def found() -> Any:
    return SCRIPT.architecture(ROOT)


def excused(name: str, reasons: dict[str, str]) -> bool:
    return any(name == each or name.startswith(f"{each}.") for each in reasons)


def test_functions_fit_on_a_screen(found: Any):
    assert found.longest_function <= MAX_FUNCTION_LINES, found.longest_functions


def test_classes_have_few_methods_and_fields(found: Any):
    assert {each.name for each in found.classes_over_20_methods} <= MANY_METHODS.keys()
    assert {each.name for each in found.classes_over_15_fields} <= MANY_FIELDS.keys()


def test_functions_have_few_parameters(found: Any):
    over = [each.name for each in found.functions_over_8_parameters]
    assert [name for name in over if not excused(name, MANY_PARAMETERS)] == []


def test_no_exception_outlives_its_reason(found: Any):
    assert {each.name for each in found.classes_over_20_methods} == MANY_METHODS.keys()
    assert {each.name for each in found.classes_over_15_fields} == MANY_FIELDS.keys()
    over = [each.name for each in found.functions_over_8_parameters]
    assert all(any(excused(name, {each: ""}) for name in over) for each in MANY_PARAMETERS)


def test_no_module_of_the_client_assigns_to_fields_of_another_object(found: Any):
    assert found.foreign_assignments == []


def test_no_modules_import_each_other(found: Any):
    assert found.circles == []


def test_a_folder_holds_a_dozen_modules_at_most(found: Any):
    assert found.largest_folder <= MAX_FOLDER, found.largest_folders


def test_the_script_finds_what_it_counts(tmp_path: Path):
    package = tmp_path / "client"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "one.py").write_text(
        "from client import two\n\n\nclass Wide:\n    a: int\n    b: int\n\n    def __init__(self, other):\n"
        "        self.c = other\n        other.d, self.e = 1, 2\n        self.c.f += 1\n        del other.g\n"
        "        setattr(other, 'h', 1)\n        setattr(self, 'h', 1)\n"
    )
    (package / "two.py").write_text("def lazy(a, *, b, **c):\n    from .one import Wide\n    return Wide\n")
    out = tmp_path / "figures.json"
    SCRIPT.main(["--root", str(tmp_path), "--json", str(out)])
    figures = json.loads(out.read_text())
    assert figures["foreign_assignments_client"] == 4
    assert figures["import_circles"] == 1
    assert figures["most_fields"] == 4
    assert figures["most_methods"] == 1
    assert figures["largest_folder"] == 3
    assert figures["longest_function"] == 7


def test_a_folder_without_packages_is_said_in_one_line(tmp_path: Path):
    with pytest.raises(SystemExit, match="holds none of"):
        SCRIPT.main(["--root", str(tmp_path)])


def folders_of_the_page() -> set[str]:
    """The folders of the tree in docs/architecture.md, by their indentation."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    block = re.search(r"## The tree\n.*?\n\n((?:    .*\n)+)", page, re.DOTALL)
    assert block is not None
    found: set[str] = set()
    above: list[tuple[int, str]] = []
    for line in block[1].splitlines():
        names = re.match(r"( +)((?:[\w]+/ ?)+)", line)
        if names is None:
            continue
        depth = len(names[1])
        above = [each for each in above if each[0] < depth]
        prefix = above[-1][1] if above else ""
        for name in names[2].split():
            found.add(f"{prefix}{name}".rstrip("/"))
        above.append((depth, f"{prefix}{names[2].split()[0]}"))
    return found


def test_the_tree_in_the_architecture_page_is_the_tree():
    roots = ("tensor_codec", "routing", "node", "client", "benchmarks")
    folders = {
        str(path.parent.relative_to(ROOT)) for root in roots for path in (ROOT / root).rglob("__init__.py")
    }
    assert {each for each in folders_of_the_page() if not each.startswith("tests")} == folders


def test_the_states_in_the_architecture_page_are_those_of_the_core():
    page = (ROOT / "docs" / "architecture.md").read_text()
    arrows = set(re.findall(r"^    ([A-Z]+) --> ([A-Z]+)", page, re.MULTILINE))
    assert arrows == {(one.name, other.name) for one, others in NEXT.items() for other in others}


def test_no_two_test_files_have_one_name():
    """pytest imports them by name, so that one of the two would be refused."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
