"""Figures of README.md and docs/benchmarks.md: measured into docs/figures, and written into the documents.

    python -m benchmarks figures --measure    # the demo, decoding over 1, 2 and 3 servers; then as below
    python -m benchmarks figures              # write the documents' blocks out of the files

A block stands between `<!-- figures: NAME -->` and `<!-- end of figures -->`.  Nothing in it is written by
hand; a test compares.  The figures of Petals (docs/figures/petals.json) are of another machine: of these
only shares are shown.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.decode import decode
from benchmarks.lib.machine import Elsewhere, machine

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "docs" / "figures"
SERVERS = (1, 2, 3)
DOCUMENTS = ("README.md", "docs/benchmarks.md", "docs/compared-with-petals.md")
Figures = dict[str, Any]  # Any: JSON, by the file's name


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure if told to, then write the documents; 1 if a command failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks figures")
    parser.add_argument("--measure", action="store_true", help="run the commands first (ten minutes)")
    parser.add_argument("--rounds", type=int, default=5, help="of each way of decoding (%(default)s)")
    flags = parser.parse_args(arguments)
    if flags.measure:
        (FIGURES / "demo.json").write_text(json.dumps(run_demo(), indent=2) + "\n")
        for servers in SERVERS:
            file = FIGURES / f"decode-{servers}.json"
            words = ["--servers", str(servers), "--rounds", str(flags.rounds), "--json", str(file)]
            if code := decode.main(words):
                return code
    figures = read_figures()
    for name in DOCUMENTS:
        document = ROOT / name
        document.write_text(with_figures(document.read_text(), figures))
    return 0


def run_demo() -> dict[str, Any]:
    """What the demo prints, but for lines that name a file of this machine.  Raises CalledProcessError."""
    from node.main import _best_dtype

    about, elsewhere = machine(), Elsewhere()
    command = [sys.executable, str(ROOT / "scripts" / "demo.py")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    about["others"] = elsewhere.share()
    print(done.stdout)
    lines = without_files(done.stdout.splitlines())
    return {"command": "make demo", "machine": about, "dtype": _best_dtype("cpu"), "lines": lines}


def without_files(lines: Sequence[str]) -> list[str]:
    """The lines that name no file of this machine, and tell of no progress."""
    return [line for line in lines if not re.search(r"(^| )/\w|^checking ", line)]


def read_figures() -> Figures:
    """The files that the blocks are made of, by name."""
    names = ["demo", "petals", "startup-black-holed", *(f"decode-{servers}" for servers in SERVERS)]
    return {name: json.loads((FIGURES / f"{name}.json").read_text()) for name in names}


def with_figures(document: str, figures: Figures) -> str:
    """The document with what stands in its blocks made anew.  KeyError for a block of no known name."""

    def block(found: re.Match[str]) -> str:
        return f"{found[1]}\n{BLOCKS[found[2]](figures)}\n{found[3]}"

    begin, end = r"(<!-- figures: ([\w-]+) -->)", r"(<!-- end of figures -->)"
    return re.sub(rf"{begin}\n.*?{end}", block, document, flags=re.DOTALL)


# Blocks


def demo_block(figures: Figures) -> str:
    """What the demo printed, and on what."""
    demo = figures["demo"]
    printed = "\n".join(demo["lines"]).strip("\n")
    return f"```text\n{printed}\n```\n\nMeasured in {demo['dtype']} on {described(demo['machine'])}."


def beside_petals_block(figures: Figures) -> str:
    """Shares of what transformers makes on the same machine, and our own figures."""
    ours, petals = decodes(figures), figures["petals"]
    theirs = [petals["servers"][str(servers)] for servers in SERVERS]
    low, high = petals["reference_steps_per_s"]
    rows = [
        (
            "decode steps/s, share of transformers': Petals",
            [f"{one['steps_per_s'] / high:.2f} to {one['steps_per_s'] / low:.2f}" for one in theirs],
        ),
        ("decode steps/s, share of transformers': Raceme", column(ours, "{share_of_reference:.2f}")),
        (
            "time to first token, multiple of transformers': Petals",
            [f"{one['ttft_s'] / petals['reference_ttft_s']:.2f}" for one in theirs],
        ),
        (
            "time to first token, multiple of transformers': Raceme",
            [f"{one['ttft_s'] / one['reference_ttft_s']:.2f}" for one in ours],
        ),
        (
            "Raceme: decode steps/s (transformers)",
            column(ours, "{steps_per_s:.1f} ({reference_steps_per_s:.1f})"),
        ),
        ("Raceme: time to first token, ms (transformers)", first_tokens(ours)),
        ("Raceme: resident memory of the largest server, MiB", column(ours, "{server_rss_mib:.0f}")),
        ("Raceme: resident memory of the client, MiB", column(ours, "{client_rss_mib:.0f}")),
    ]
    note = (
        f"Raceme {ours[0]['machine']['raceme']} on {described(ours[0]['machine'])}; Petals on"
        f" {petals['machine']}."
    )
    return f"{markdown_table(rows)}\n\n{note}"


def decode_block(figures: Figures) -> str:
    """All that a run of `benchmarks decode` is about."""
    ours = decodes(figures)
    rows = [
        ("tokens equal", ["yes" if one["tokens_equal"] else "no" for one in ours]),
        (
            "steps/s (p10, p90)",
            column(ours, "{steps_per_s:.1f} ({steps_per_s_p10:.1f}, {steps_per_s_p90:.1f})"),
        ),
        ("transformers' `generate`, steps/s", column(ours, "{reference_steps_per_s:.1f}")),
        ("share of transformers", column(ours, "{share_of_reference:.2f}")),
        ("our code in one process, steps/s", column(ours, "{same_code_steps_per_s:.1f}")),
        ("added for each server, ms", column(ours, "{hop_overhead_ms:.1f}")),
        ("on the wire, in queues and threads, for each server, ms", column(ours, "{wire_ms_per_hop:.1f}")),
        ("time to first token, ms (transformers)", first_tokens(ours)),
        ("resident, largest server, MiB", column(ours, "{server_rss_mib:.0f}")),
        ("resident, client, MiB", column(ours, "{client_rss_mib:.0f}")),
        ("resident, only torch and transformers imported, MiB", column(ours, "{torch_rss_mib:.0f}")),
        (
            "CPU seconds a token, servers / client",
            column(ours, "{server_cpu_s_per_token:.3f} / {client_cpu_s_per_token:.3f}"),
        ),
        (
            "bytes a token, client up and down, the prompt's included",
            column(ours, "{client_bytes_per_token:,.0f}"),
        ),
        ("node online after, s", [spread(one["start_s_all"]) for one in ours]),
    ]
    return f"Measured on {described(ours[0]['machine'])}:\n\n{markdown_table(rows)}"


def black_holed_block(figures: Figures) -> str:
    """What a server that answers nothing costs new clients."""
    run = figures["startup-black-holed"]
    rows = [
        f"| {name} | {1e3 * run[f'{what}_s']:.0f} | {1e3 * run[f'{what}_beside_black_holed_s']:.0f} |"
        f" {run[f'{what}_more_ms']:+.0f} |"
        for name, what in (("until a chain is chosen", "chain"), ("to the first token", "first_token"))
    ]
    head = ["| ms | without | beside it | more |", "| --- | --- | --- | --- |"]
    about = f"Medians of {run['clients']} clients of each kind, on {described(run['machine'])}:"
    return "\n".join([about, "", *head, *rows])


BLOCKS: Mapping[str, Callable[[Figures], str]] = {
    "demo": demo_block,
    "beside-petals": beside_petals_block,
    "decode": decode_block,
    "black-holed": black_holed_block,
}


def decodes(figures: Figures) -> list[Any]:
    """The runs over one, two and three servers.  ValueError where they are not of one machine and version."""
    runs = [figures[f"decode-{servers}"] for servers in SERVERS]
    kinds = {json.dumps({**run["machine"], "others": 0, "day": ""}, sort_keys=True) for run in runs}
    if len(kinds) > 1:
        raise ValueError(f"figures of different machines or versions stand beside each other: {kinds}")
    return runs


def described(about: Mapping[str, Any]) -> str:
    """A machine in words."""
    flags = ", ".join(about["cpu_flags"]) or "no vector units that matter"
    others = round(100 * about["others"])
    busy = f", while other programs took {others} % of the cores" if others >= 5 else ""
    return (
        f"{about['cores']} cores of {about['cpu']} ({flags}), Python {about['python']},"
        f" torch {about['torch']}, transformers {about['transformers']}, {about['day']}{busy}"
    )


def column(runs: Sequence[Any], form: str) -> list[str]:
    """One figure of each run, in the same form."""
    return [form.format_map(run) for run in runs]


def first_tokens(runs: Sequence[Any]) -> list[str]:
    """Milliseconds to the first token, ours and the library's."""
    return [f"{1e3 * run['ttft_s']:.0f} ({1e3 * run['reference_ttft_s']:.0f})" for run in runs]


def spread(values: Sequence[float]) -> str:
    """Least and most, or the only one."""
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} to {high}"


def markdown_table(rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A column for each number of servers."""
    head = " | ".join(f"{servers} server{'s' * (servers > 1)}" for servers in SERVERS)
    lines = [f"| | {head} |", "| --- " * (len(SERVERS) + 1) + "|"]
    return "\n".join(lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows])
