"""Tables in markdown, and a machine in words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Figures = Mapping[str, Any]  # Any: JSON; the results by the names of their files, or `Results`
Result = Mapping[str, Any]


class NotMeasured(Exception):
    """There is no file of this result yet."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Results(dict[str, Any]):
    """All results by the names of their files.  A name without a file raises NotMeasured."""

    def __missing__(self, name: str) -> Any:
        raise NotMeasured(name)


def markdown_table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table with a name at the left of each row; `head` names the other columns."""
    lines = [f"| | {' | '.join(head)} |", "| --- " * (len(head) + 1) + "|"]
    return "\n".join(lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows])


def with_note(table: str, *results: Result) -> str:
    """A table, and below it the source of its figures."""
    return f"{table}\n\nMeasured on {measured_on(results)}."


def column(results: Sequence[Result], form: str) -> list[str]:
    """One figure of each result, in one form."""
    return [form.format_map(result) for result in results]


def spread(values: Sequence[float]) -> str:
    """The smallest and the largest value, or the only one."""
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} to {high}"


def yes(value: bool) -> str:
    """A yes or no in a cell."""
    return "yes" if value else "no"


def described(about: Mapping[str, Any]) -> str:
    """A machine in words, with the versions that matter."""
    flags = ", ".join(about["cpu_flags"]) or "no vector units that matter"
    return (
        f"{about['cores']} cores of {about['cpu']} ({flags}), Python {about['python']},"
        f" torch {about['torch']}, transformers {about['transformers']}, {about['day']}{_busy([about])}"
    )


def measured_on(results: Sequence[Result]) -> str:
    """Machine, day and commit of one table in a few words.

    Raises ValueError where the results are of different machines or versions: one table holds figures of
    one machine and version.
    """
    machines = [result["machine"] for result in results if result["machine"] is not None]
    if not machines:
        return f"a machine that is not in the file{_commits(results)}"
    kinds = {json.dumps({**about, "others": 0, "day": ""}, sort_keys=True) for about in machines}
    if len(kinds) > 1:
        raise ValueError(f"figures of different machines or versions stand next to each other: {kinds}")
    about = machines[0]
    days = sorted({machine["day"] for machine in machines})
    return f"{about['cores']} cores of {about['cpu']}, {', '.join(days)}{_commits(results)}{_busy(machines)}"


def _commits(results: Sequence[Result]) -> str:
    commits = sorted({result["commit"] for result in results if "commit" in result})
    return f", commit{'s' * (len(commits) > 1)} {', '.join(commits)}" if commits else ""


def _busy(machines: Sequence[Mapping[str, Any]]) -> str:
    """A remark if other programs took a twentieth of the cores or more."""
    others = round(100 * max(about["others"] for about in machines))
    return f", while other programs took {others} % of the cores" if others >= 5 else ""
