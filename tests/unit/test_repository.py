"""The house in order: who may import whom, what an import costs, and what may stand in a file."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("tensor_codec", "routing", "node", "client")
PROGRAMS = ("benchmarks", "examples", "scripts")  # use the packages, are not shipped with them


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@dataclass(frozen=True)
class Import:
    importer: str
    imported: str
    line: int
    at_start: bool  # outside functions and `if TYPE_CHECKING`: runs when the module is imported


@cache
def imports_of(path: Path) -> tuple[Import, ...]:
    """Every import in a file.  `from a import b` counts as both a and a.b, since b may be a module."""
    tree = ast.parse(path.read_text(), str(path))
    importer = module_name(path)
    package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]

    def visit(node: ast.AST, at_start: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(importer, alias.name, node.lineno, at_start)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield Import(importer, source, node.lineno, at_start)
            for alias in node.names:
                yield Import(importer, f"{source}.{alias.name}", node.lineno, at_start)
        else:
            later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                later = True
            for child in ast.iter_child_nodes(node):
                yield from visit(child, at_start and not later)

    return tuple(visit(tree, True))


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


@dataclass(frozen=True)
class Rule:
    who: tuple[str, ...]
    but_for: tuple[str, ...]
    may_not_import: tuple[str, ...]
    because: str


RULES = (
    Rule(
        (*PACKAGES, *PROGRAMS),
        ("node.network", "benchmarks.network.wire"),  # that benchmark measures libp2p itself beside us
        ("libp2p",),
        "node.network is the one adapter to libp2p",
    ),
    Rule(
        ("tensor_codec",),
        (),
        ("routing", "node", "client", "trio", "libp2p", "asyncio", "socket"),
        "tensor_codec is bytes and values alone, at the bottom of the house",
    ),
    Rule(
        ("routing",),
        (),
        ("node", "client", "torch", "trio", "libp2p", "asyncio", "socket", "time", "threading"),
        "routing decides in pure functions: no sockets, no clock, no torch",
    ),
    Rule(
        ("node.model",),
        (),
        ("trio", "libp2p", "node.network", "node.serving", "client"),
        "node.model is used from a thread and from a REPL, without a network",
    ),
    Rule(
        ("node.network",),
        (),
        ("torch", "transformers", "node.model", "node.serving", "client"),
        "node.network carries bytes and knows no model",
    ),
    Rule(
        ("node",),
        ("node.__main__",),
        ("client",),
        "a node knows nothing of its clients; only the command line does",
    ),
    Rule(
        ("client",),
        (),
        ("node.serving",),
        "a client must not pay for what a server imports",
    ),
    Rule(
        (
            "client.session.core",
            "client.session.actions",
            "client.session.hop_state",
            "client.session.route_state",
            "client.session.steps",
            "client.session.terms",
            "client.session.repair",
        ),
        (),
        (
            "trio",
            "torch",
            "time",
            "random",
            "asyncio",
            "socket",
            "client.session.route",
            "client.session.session",
        ),
        "the core of a client's session takes events and the time, and returns actions",
    ),
    Rule(
        ("node.serving.executor",),
        (),
        ("node.serving.sessions", "node.network", "libp2p"),
        "the executor batches whatever it is given and knows no session",
    ),
    Rule(
        PACKAGES,
        ("client.bridges.asyncio_swarm", "client.gateway"),
        ("asyncio", "uvloop"),
        "asyncio stands in its bridge and in the gateway alone; everything else is trio",
    ),
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.because)
def test_imports_point_one_way(rule: Rule):
    paths = [
        path
        for path in python_files(*PACKAGES, *PROGRAMS)
        if within(module_name(path), *rule.who) and not within(module_name(path), *rule.but_for)
    ]
    assert paths, f"{rule.who} hold no Python: does the rule still name the right packages?"
    broken = {
        f"{found.importer}, line {found.line}": f"imports {found.imported}"
        for path in paths
        for found in imports_of(path)
        if within(found.imported, *rule.may_not_import)
    }
    assert not broken, f"{rule.because}\n" + "\n".join(map(": ".join, broken.items()))


def reached_at_start(module: str) -> dict[str, str]:
    """Each module of ours that importing `module` imports, and who imports it first."""
    paths = {module_name(path): path for path in python_files(*PACKAGES)}
    reached, todo = {module: ""}, [module]
    while todo:
        current = todo.pop()
        packages = [current.rsplit(".", level)[0] for level in range(1, current.count(".") + 1)]
        found = [found.imported for found in imports_of(paths[current]) if found.at_start]
        for name in [*packages, *found]:
            if name in paths and name not in reached:
                reached[name] = current
                todo.append(name)
    return reached


@pytest.mark.parametrize(
    "module", ["node.serving.executor.engine", "node.serving.cache_budget", "node.serving.sessions.state"]
)
def test_the_executor_can_be_imported_without_libp2p(module: str):
    paths = {module_name(path): path for path in python_files(*PACKAGES)}
    for name, importer in reached_at_start(module).items():
        found = [
            each for each in imports_of(paths[name]) if each.at_start and within(each.imported, "libp2p")
        ]
        assert not found, f"{module} reaches {name} (through {importer}), which imports libp2p"


def test_the_core_of_a_session_can_be_imported_without_trio_and_torch():
    paths = {module_name(path): path for path in python_files(*PACKAGES)}
    for name, importer in reached_at_start("client.session.core").items():
        if within(name, "client") and not within(name, "client.session", "client.chains"):
            continue  # the package itself: `client.connect` is a function in a module of its name
        found = [
            each
            for each in imports_of(paths[name])
            if each.at_start and within(each.imported, "trio", "torch")
        ]
        assert not found, f"client.session.core reaches {name} (through {importer}), which imports {found}"


def modules_after(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running `statement`."""
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    return set(ran.stdout.split())


@pytest.mark.parametrize("package", ["node", "client", "routing", "tensor_codec"])
def test_importing_a_package_is_cheap(package: str):
    heavy = {"torch", "transformers", "libp2p", "trio", "numpy", "rich", "httpx", "asyncio"}
    if package == "client":
        heavy.remove("trio")  # `client.connect` is a function in a module of its name: no way to wait with it
    loaded = modules_after(f"import {package}") & heavy
    assert not loaded


def test_all_of_routing_loads_without_torch_trio_or_libp2p():
    modules = ", ".join(module_name(path) for path in python_files("routing"))
    loaded = modules_after(f"import {modules}") & {"torch", "trio", "libp2p", "transformers"}
    assert not loaded


@pytest.mark.parametrize("path", python_files(*PACKAGES, *PROGRAMS), ids=module_name)
def test_every_module_says_in_its_first_line_what_it_is_for(path: Path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, f"{path.relative_to(ROOT)} has no docstring"
    first = path.read_text().removeprefix("#!/usr/bin/env python3\n").lstrip().splitlines()[0].strip("\"' \n")
    assert len(first.split()) >= 3, (
        f"{path.relative_to(ROOT)}: {first!r} says too little, or stands below the quotes"
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_of_a_package_is_shipped(package: str):
    without = {
        path.parent.relative_to(ROOT)
        for path in python_files(package)
        if not (path.parent / "__init__.py").exists()
    }
    assert not without, "no __init__.py, so not in the wheel"
    assert (ROOT / package / "py.typed").exists(), "without py.typed users' type checkers ignore our types"


def repository_files() -> list[Path]:
    """Text files that are, or would be, under version control."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout.decode()
        paths = [ROOT / name for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive, or no git
        made = re.compile(r"(^|/)(\.(?!ci/)[^/]+|__pycache__|[^/]+\.egg-info)/")  # caches, .venv
        paths = [path for path in ROOT.rglob("*") if not made.search(str(path.relative_to(ROOT)))]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:4096]]


# Written in pieces, so that this file does not find itself.
MACHINE = re.compile(
    "|".join(
        (
            r"(?<![\w./-])/(?:ro" + r"ot|wo" + r"rk|tmp/w)/",
            r"/ho" + r"me/\w",
            r"/Use" + r"rs/\w",
            r"/opt/py" + r"pi",
            r"py" + r"pi\.org",
            r"pytho" + r"nhosted\.org",
            r"download\.pyto" + r"rch\.org",
            r"deb\.deb" + r"ian\.org",
            r"anaco" + r"nda\.org",
        )
    )
)


def test_no_file_names_a_folder_of_one_machine_or_the_host_of_a_registry():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match.group()}"
        for path in repository_files()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if (match := MACHINE.search(line))
    ]
    assert not found, "\n".join(found)


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, Version]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {
        canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)
    }


def test_every_dependency_is_pinned_within_the_range_that_we_promise():
    groups = [project()["dependencies"], *project()["optional-dependencies"].values()]
    lines = (line for group in groups for line in group if not line.startswith("raceme["))
    for requirement in map(Requirement, lines):
        pin = pins().get(canonicalize_name(requirement.name))
        assert pin is not None, f"constraints.txt pins no {requirement.name}"
        assert pin in requirement.specifier, f"{requirement} does not admit the tested version {pin}"


def test_the_changelog_knows_the_version():
    assert f"## [{project()['version']}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("path", ["scripts/setup.sh", ".ci/run"])
def test_scripts_can_be_run(path: str):
    assert os.access(ROOT / path, os.X_OK)
