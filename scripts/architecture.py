"""Measures the structure of the code: `python scripts/architecture.py [--json FILE] [--root FOLDER]`.

Every figure comes from the syntax trees, nothing is imported or run.  tests/unit/test_architecture.py
holds the project to bounds and names each exception with its reason.

    longest_function              lines, decorators and docstring included
    most_methods, most_fields     of one class; properties are methods
    foreign_assignments_client    assignments in client/ to a field of another object than self
    import_circles                groups of modules that import each other, lazy imports included
    largest_folder                Python files directly in one folder, tests left out
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

PACKAGES = ("tensor_codec", "routing", "node", "client")
PROGRAMS = ("benchmarks", "examples", "scripts")
MAX_METHODS, MAX_FIELDS, MAX_PARAMETERS = 20, 15, 8

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Sized:
    """A function or class and one of its sizes.  name: `module.Class.method`."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class Architecture:
    """The figures of one checkout.  Lists are sorted from the largest down."""

    longest_function: int
    most_methods: int
    most_fields: int
    foreign_assignments_client: int
    import_circles: int
    largest_folder: int
    longest_class: int
    longest_functions: list[Sized]
    longest_classes: list[Sized]
    classes_over_20_methods: list[Sized]
    classes_over_15_fields: list[Sized]
    functions_over_8_parameters: list[Sized]
    foreign_assignments: list[str]
    circles: list[list[str]]
    largest_folders: list[Sized]


def architecture(root: Path) -> Architecture:
    """Measure the checkout at `root`.  Raises SyntaxError for a file that is not Python."""
    trees = {
        module_name(path, root): ast.parse(path.read_text(), str(path)) for path in files(root, PACKAGES)
    }
    functions = [each for name, tree in trees.items() for each in functions_in(tree, name)]
    classes = [each for name, tree in trees.items() for each in classes_in(tree, name)]
    lengths = ranked((name, lines(node)) for name, node in functions)
    class_lengths = ranked((name, lines(node)) for name, node in classes)
    methods = ranked((name, len(methods_of(node))) for name, node in classes)
    fields = ranked((name, len(fields_of(node))) for name, node in classes)
    parameters = ranked((name, len(parameters_of(node))) for name, node in functions)
    foreign = [
        f"{name}:{line}: {text}"
        for name, tree in trees.items()
        if name.split(".")[0] == "client"
        for line, text in foreign_assignments(tree)
    ]
    circles = circles_of(imports_between(trees, packages_of(root)))
    folders = ranked(folder_sizes(root).items())
    return Architecture(
        longest_function=largest(lengths),
        most_methods=largest(methods),
        most_fields=largest(fields),
        foreign_assignments_client=len(foreign),
        import_circles=len(circles),
        largest_folder=largest(folders),
        longest_class=largest(class_lengths),
        longest_functions=lengths[:10],
        longest_classes=class_lengths[:10],
        classes_over_20_methods=[each for each in methods if each.size > MAX_METHODS],
        classes_over_15_fields=[each for each in fields if each.size > MAX_FIELDS],
        functions_over_8_parameters=[each for each in parameters if each.size > MAX_PARAMETERS],
        foreign_assignments=foreign,
        circles=circles,
        largest_folders=folders[:10],
    )


def files(root: Path, folders: tuple[str, ...]) -> list[Path]:
    """The Python files below these folders of the root."""
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def module_name(path: Path, root: Path) -> str:
    """`node.main` for node/main.py, `node` for node/__init__.py."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def packages_of(root: Path) -> frozenset[str]:
    """The names of the modules that are folders."""
    return frozenset(module_name(path, root) for path in files(root, PACKAGES) if path.name == "__init__.py")


def ranked(sizes: Iterable[tuple[str, int]]) -> list[Sized]:
    """Named sizes from the largest down, equal ones by name."""
    return sorted((Sized(*each) for each in sizes), key=lambda each: (-each.size, each.name))


def largest(sizes: list[Sized]) -> int:
    """The first size, 0 where there is none."""
    return sizes[0].size if sizes else 0


def lines(node: Function | ast.ClassDef) -> int:
    """From the first decorator to the last line."""
    first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
    return (node.end_lineno or node.lineno) - first + 1


def functions_in(tree: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    """Every function, methods and inner functions too, by its full name."""
    for child in ast.iter_child_nodes(tree):
        name = f"{prefix}.{child.name}" if isinstance(child, Function | ast.ClassDef) else prefix
        if isinstance(child, Function):
            yield name, child
        yield from functions_in(child, name)


def classes_in(tree: ast.AST, prefix: str) -> Iterator[tuple[str, ast.ClassDef]]:
    """Every class, inner ones too, by its full name."""
    for child in ast.iter_child_nodes(tree):
        name = f"{prefix}.{child.name}" if isinstance(child, Function | ast.ClassDef) else prefix
        if isinstance(child, ast.ClassDef):
            yield name, child
        yield from classes_in(child, name)


def methods_of(node: ast.ClassDef) -> set[str]:
    """Names of methods and properties, special methods included."""
    return {child.name for child in node.body if isinstance(child, Function)}


def fields_of(node: ast.ClassDef) -> set[str]:
    """Annotated names of the class body, and names that a method assigns to self; no ClassVar."""
    declared = {
        child.target.id
        for child in node.body
        if isinstance(child, ast.AnnAssign)
        and isinstance(child.target, ast.Name)
        and "ClassVar" not in ast.unparse(child.annotation)
    }
    assigned = {
        target.attr
        for method in node.body
        if isinstance(method, Function)
        for statement in ast.walk(method)
        for target in assigned_by(statement)
        if isinstance(target, ast.Attribute) and is_name(target.value, "self")
    }
    return declared | assigned


def parameters_of(node: Function) -> list[str]:
    """Names of the parameters without self and cls."""
    arguments = node.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    every += [each for each in (arguments.vararg, arguments.kwarg) if each is not None]
    return [each.arg for each in every if each.arg not in ("self", "cls")]


def foreign_assignments(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, statement) where a field of another object than self or cls is assigned or deleted."""
    for node in ast.walk(tree):
        for target in assigned_by(node):
            if isinstance(target, ast.Attribute) and not is_name(target.value, "self", "cls"):
                yield target.lineno, ast.unparse(target)
        if isinstance(node, ast.Call) and is_name(node.func, "setattr", "delattr"):
            owner = node.args[0] if node.args else None
            if owner is not None and not is_name(owner, "self", "cls"):
                yield node.lineno, ast.unparse(node)


def assigned_by(node: ast.AST) -> Iterator[ast.expr]:
    """The targets that a statement assigns or deletes, one by one."""
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign | ast.Delete):
        targets = list(node.targets)
    elif isinstance(node, ast.AugAssign | ast.AnnAssign | ast.For | ast.AsyncFor):
        targets = [node.target]
    elif isinstance(node, ast.withitem) and node.optional_vars is not None:
        targets = [node.optional_vars]
    while targets:
        target = targets.pop()
        if isinstance(target, ast.Tuple | ast.List):
            targets += target.elts
        elif isinstance(target, ast.Starred):
            targets.append(target.value)
        else:
            yield target


def is_name(node: ast.expr, *names: str) -> bool:
    """Whether an expression is one of these plain names."""
    return isinstance(node, ast.Name) and node.id in names


def imports_between(trees: Mapping[str, ast.AST], packages: frozenset[str]) -> dict[str, set[str]]:
    """The imports of each module, in functions and under TYPE_CHECKING too."""
    found: dict[str, set[str]] = {name: set() for name in trees}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found[name].update(alias.name for alias in node.names if alias.name in trees)
            elif isinstance(node, ast.ImportFrom):
                source = absolute(node, name, packages)
                for alias in node.names:
                    inner = f"{source}.{alias.name}"
                    found[name].update({inner} if inner in trees else {source} & trees.keys())
        found[name].discard(name)
    return found


def absolute(node: ast.ImportFrom, module: str, packages: frozenset[str]) -> str:
    """The full name of the module that a `from ... import` names."""
    if not node.level:
        return node.module or ""
    above = module.split(".")
    above = above[: len(above) - node.level + (module in packages)]
    return ".".join([*above, *([node.module] if node.module else [])])


def circles_of(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of two modules or more (Tarjan, 1972), each sorted."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    circles: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            at = stack.index(name)
            circle = sorted(stack[at:])
            del stack[at:]
            if len(circle) > 1:
                circles.append(circle)

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return sorted(circles)


def folder_sizes(root: Path) -> dict[str, int]:
    """The number of Python files directly in each folder of packages and programs."""
    sizes: dict[str, int] = defaultdict(int)
    for path in files(root, (*PACKAGES, *PROGRAMS)):
        sizes[str(path.parent.relative_to(root))] += 1
    return dict(sizes)


def table(found: Architecture) -> str:
    """The figures for people."""
    rows = [
        ("longest function", found.longest_functions[:1]),
        ("longest class", found.longest_classes[:1]),
        (f"classes over {MAX_METHODS} methods", found.classes_over_20_methods),
        (f"classes over {MAX_FIELDS} fields", found.classes_over_15_fields),
        (f"functions over {MAX_PARAMETERS} parameters", found.functions_over_8_parameters),
        ("largest folder", found.largest_folders[:1]),
    ]
    text = [
        f"{what}: {', '.join(f'{each.name} {each.size}' for each in sized) or 'none'}" for what, sized in rows
    ]
    text.append(f"assignments in client/ to other objects' fields: {len(found.foreign_assignments)}")
    text += [f"    {each}" for each in found.foreign_assignments]
    text.append(f"import circles: {len(found.circles)}")
    text += [f"    {' <-> '.join(circle)}" for circle in found.circles]
    return "\n".join(text)


def main(words: list[str] | None = None) -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description="Measures the structure of the code by its syntax trees.")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file")
    parser.add_argument("--root", metavar="FOLDER", help="another checkout than this one")
    flags = parser.parse_args(words)
    root = Path(flags.root).resolve() if flags.root else Path(__file__).resolve().parents[1]
    if not any((root / package).is_dir() for package in PACKAGES):
        sys.exit(f"{root} holds none of {', '.join(PACKAGES)}: give the root of a checkout")
    found = architecture(root)
    print(table(found))
    if flags.json:
        Path(flags.json).write_text(json.dumps(asdict(found), indent=2) + "\n")


if __name__ == "__main__":
    main()
