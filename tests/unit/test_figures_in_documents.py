"""Figures in README.md and docs/benchmarks.md are those of the files that commands wrote."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks.figures.figures import (
    BLOCKS,
    DOCUMENTS,
    ROOT,
    SERVERS,
    beside_petals_block,
    black_holed_block,
    decode_block,
    demo_block,
    described,
    read_figures,
    with_figures,
    without_files,
)
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


def test_every_block_stands_in_a_document():
    text = "".join((ROOT / name).read_text() for name in DOCUMENTS)
    assert sorted(re.findall(r"<!-- figures: ([\w-]+) -->", text)) == sorted(BLOCKS)
    assert text.count("<!-- end of figures -->") == len(BLOCKS)


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
