"""Figures and pictures of the documents are those of the files that commands wrote, and none is typed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.figures.blocks.decode import (
    SERVERS,
    beside_petals_block,
    black_holed_block,
    decode_block,
    demo_block,
)
from benchmarks.figures.blocks.swarm import rows_of
from benchmarks.figures.documents import BLOCKS, DOCUMENTS, WITH_LIMITS, typed_figures, with_figures
from benchmarks.figures.measurements import FIGURES as FOLDER
from benchmarks.figures.measurements import MEASUREMENTS, read_figures, without_files
from benchmarks.figures.pictures import PICTURES
from benchmarks.figures.tables import Results, described, measured_on
from benchmarks.lib.results import ROOT
from node.config import VERSION

ABOUT = {
    "cpu": "a processor",
    "cpu_flags": ["avx2"],
    "cores": 2,
    "python": "3.11",
    "torch": "2",
    "transformers": "5",
    "raceme": "1",
    "day": "2026-01-01",
    "others": 0.0,
}
RUN = {
    "commit": "0123456789ab",
    "machine": ABOUT,
    "tokens_equal": True,
    "steps_per_s": 10.0,
    "steps_per_s_p10": 9.0,
    "steps_per_s_p90": 11.0,
    "reference_steps_per_s": 8.0,
    "share_of_reference": 1.25,
    "same_code_steps_per_s": 12.0,
    "hop_overhead_ms": 1.5,
    "wire_ms_per_hop": 1.0,
    "ttft_s": 0.1,
    "reference_ttft_s": 0.2,
    "server_rss_mib": 500.4,
    "client_rss_mib": 400.0,
    "torch_rss_mib": 300.0,
    "server_cpu_s_per_token": 0.05,
    "client_cpu_s_per_token": 0.01,
    "client_bytes_per_token": 1234.5,
    "start_s_all": [6.0, 7.26],
}
FIGURES = {
    "demo": {"machine": ABOUT, "dtype": "float32", "lines": ["", "one", "two", ""]},
    "petals": {
        "machine": "another machine",
        "reference_steps_per_s": [20.0, 25.0],
        "reference_ttft_s": 0.1,
        "servers": {str(servers): {"steps_per_s": 15.0, "ttft_s": 0.15} for servers in SERVERS},
    },
    **{f"decode-{servers}": RUN for servers in SERVERS},
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_figures_in_a_document_are_those_of_the_files(name: str):
    document = (ROOT / name).read_text()
    assert with_figures(document, read_figures()) == document, "run python -m benchmarks figures"


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_the_pictures_are_those_of_the_files(name: str):
    assert PICTURES[name](read_figures()) == (ROOT / name).read_text(), "run python -m benchmarks figures"


def test_every_picture_stands_in_a_document():
    for name in PICTURES:
        assert any(f"]({Path(name).relative_to(Path(document).parent)})" in (ROOT / document).read_text()
                   for document in DOCUMENTS)  # fmt: skip


def test_every_block_stands_in_a_document():
    text = "".join((ROOT / name).read_text() for name in DOCUMENTS)
    assert sorted(re.findall(r"<!-- figures: ([\w-]+) -->", text)) == sorted(BLOCKS)
    assert text.count("<!-- end of figures -->") == len(BLOCKS)


@pytest.mark.parametrize("name", sorted({*DOCUMENTS} - WITH_LIMITS))
def test_no_figure_in_a_document_is_typed(name: str):
    assert typed_figures((ROOT / name).read_text()) == []


@pytest.mark.parametrize(
    "typed",
    [
        "It runs at 20.3 steps/s there.",
        "A step takes 4 ms.",
        "Of a step 0.3 % is the journal.",
        "The node held 1,588 MiB.",
        "| | s |\n| --- | --- |\n| online after | 6.9 |",
        "| thin | 0.953 (0.854) |",
    ],
)
def test_a_typed_figure_is_found(typed: str):
    assert typed_figures(f"Some text.\n\n{typed}\n") != []


@pytest.mark.parametrize(
    "sound",
    [
        "    python -m benchmarks wan --rtt-ms 20 --mbit 10",
        "Prompts of 512 tokens over two servers, and 30 blocks.",
        "`--limit 180 s` ends it.",
        "<!-- figures: decode -->\n20.3 steps/s\n<!-- end of figures -->",
        "Recovered were 88 % of the tokens ([a paper](https://arxiv.org/abs/1)).",
        "| `ttft_s` | time to the first token |",
    ],
)
def test_settings_code_and_cited_figures_are_no_typed_figures(sound: str):
    assert typed_figures(f"Some text.\n\n{sound}\n") == []


OF_OTHER_PROGRAMS = {"petals", "mutants"}  # measured once, on another machine; by `make mutants`
RESULTS = [path for path in sorted(FOLDER.glob("*.json")) if path.stem not in OF_OTHER_PROGRAMS]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_file_of_results_says_where_it_is_from(path: Path):
    found = json.loads(path.read_text())
    for result in found if isinstance(found, list) else [found]:
        assert re.fullmatch(r"[0-9a-f]{12}\+?", result["commit"])
        assert "machine" in result
        assert result["machine"] is not None or "command" not in result  # older than this rule


def test_every_result_has_a_command_that_measures_it_anew():
    assert {path.stem for path in RESULTS} <= set(MEASUREMENTS)


def test_the_figures_are_of_this_version():
    figures = read_figures()
    for name in ("demo", *(f"decode-{servers}" for servers in SERVERS)):
        assert figures[name]["machine"]["raceme"] == VERSION, f"{name} is of another version: make figures"


def test_what_stands_in_a_block_is_made_anew_and_nothing_else_is_touched():
    document = "before\n<!-- figures: demo -->\nold\n<!-- end of figures -->\nafter\n"
    written = with_figures(document, FIGURES)
    assert written == (
        f"before\n<!-- figures: demo -->\n{demo_block(FIGURES)}\n<!-- end of figures -->\nafter\n"
    )
    assert with_figures(written, FIGURES) == written
    with pytest.raises(KeyError):
        with_figures(document.replace("demo", "other"), FIGURES)


def test_a_block_without_a_result_says_how_to_measure_it():
    document = "<!-- figures: wan -->\n<!-- end of figures -->\n"
    assert "`python -m benchmarks figures --measure wan`" in with_figures(document, Results())
    recovery = document.replace("wan", "recovery")
    assert "--measure recovery-freeze`" in with_figures(recovery, Results({"recovery-kill": RUN}))


def test_the_demo_is_shown_as_it_was_printed():
    assert demo_block(FIGURES).startswith(
        "```text\none\ntwo\n```\n\nMeasured in float32 on 2 cores of a processor"
    )


def test_lines_that_name_files_are_left_out_of_the_demo():
    shown = ["three nodes ...", "    demo-1  12D3K  blocks 0:10  after 9.2 s", "", "13.2 tokens/s, 166 ms"]
    files = [
        "wrote /tmp/x/swarm.key: give it to every member",
        "M (revision 9d) is in /models/m",
        "checking a.bin",
    ]
    assert without_files([*shown, *files]) == shown
    assert without_files(read_figures()["demo"]["lines"]) == read_figures()["demo"]["lines"]


def test_systems_on_different_machines_are_compared_by_shares_of_transformers_on_the_same_machine():
    rows = {row.split(" | ")[0].strip("| "): row for row in beside_petals_block(FIGURES).splitlines()}
    assert rows["decode steps/s, share of transformers': Petals"].count("0.60 to 0.75") == len(SERVERS)
    assert rows["decode steps/s, share of transformers': Raceme"].count("1.25") == len(SERVERS)
    assert rows["time to first token, multiple of transformers': Petals"].count("1.50") == len(SERVERS)
    assert rows["time to first token, multiple of transformers': Raceme"].count("0.50") == len(SERVERS)
    assert "Petals on another machine." in beside_petals_block(FIGURES)


def test_figures_of_different_machines_do_not_stand_in_one_table():
    mixed = json.loads(json.dumps(FIGURES))
    mixed["decode-3"]["machine"]["cpu"] = "another processor"
    with pytest.raises(ValueError, match="another processor"):
        decode_block(mixed)
    later = json.loads(json.dumps(FIGURES))
    later["decode-3"]["machine"] |= {"day": "2026-01-02", "others": 0.3}
    decode_block(later)


def test_a_busy_machine_is_called_busy():
    assert "other programs" not in described(ABOUT)
    assert described(ABOUT | {"others": 0.4}).endswith("while other programs took 40 % of the cores")


def test_shares_are_of_the_figures_beside_them():
    for servers in SERVERS:
        run = json.loads((ROOT / "docs" / "figures" / f"decode-{servers}.json").read_text())
        assert run["servers"] == servers
        assert run["share_of_reference"] == pytest.approx(run["steps_per_s"] / run["reference_steps_per_s"])


def test_what_a_silent_server_costs_is_shown_with_its_sign():
    run = {
        "machine": ABOUT, "clients": 3, "chain_s": 0.004, "chain_beside_black_holed_s": 0.03,
        "chain_more_ms": 26.0, "first_token_s": 0.2, "first_token_beside_black_holed_s": 0.19,
        "first_token_more_ms": -10.0,
    }  # fmt: skip
    block = black_holed_block({"startup-black-holed": run})
    assert "| until a chain is chosen | 4 | 30 | +26 |" in block
    assert "| to the first token | 200 | 190 | -10 |" in block
    assert "Medians of 3 clients" in block


def test_simulated_rows_are_found_by_their_settings():
    run = {
        "commit": "c", "model": "llama-405b", "servers": 60, "seeds": 1, "churn": 0.0, "lost": 0.0,
        "liars": 0.0, "partition": 0.0, "noise": 0.0, "clients": 0, "load": 0.8, "client_seconds": 600.0,
        "rule": "ours", "share_of_bound_mean": 0.9,
    }  # fmt: skip
    rules = [{"rule": rule, "share_of_bound_mean": share} for rule, share in (("petals", 0.8), ("ours", 0.9))]
    both = {**run, "rules": rules}
    churned = {**run, "churn": 0.3}
    found = rows_of({"swarm-a": both, "swarm-b": churned, "other": run, "swarm-decisions": [run]}, churn=0)
    assert [(row["rule"], row["share_of_bound_mean"]) for row in found] == [("ours", 0.9), ("petals", 0.8)]


def test_a_table_names_all_of_its_commits_and_days():
    later = {**RUN, "commit": "fedcba987654", "machine": ABOUT | {"day": "2026-01-02"}}
    words = measured_on([RUN, later])
    assert "commits 0123456789ab, fedcba987654" in words
    assert "2026-01-01, 2026-01-02" in words
