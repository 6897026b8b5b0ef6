"""The verdict on an attack: statistics, thresholds, and the command line of `python -m tests.hostile`."""

from __future__ import annotations

import pytest

from benchmarks.figures.blocks.hostile import hostile_block, soak_block
from benchmarks.soak.growth import Sample, growth
from tests.hostile.__main__ import addresses_of, listing, parse, told
from tests.hostile.attacks import ATTACKS
from tests.hostile.judgement import (
    HELD,
    Newcomer,
    Phases,
    Seen,
    Thresholds,
    Vitals,
    Window,
    judged,
    latencies,
    left_over,
    percentile,
    rate,
    share_in_time,
)
from tests.hostile.stage import target_of

PEER = "12D3KooWPW5W3xqXDotptBwKmqM7tXNMVgcCVykq5vGqmiP1rh9M"
BEFORE, DURING, LEFT, BURNER = Window(0, 10), Window(10, 20), Window(25, 30), Window(30, 40)
PHASES = Phases(BEFORE, DURING, LEFT, BURNER)


def every(seconds: float, window: Window) -> list[float]:
    return [window.begin + seconds * (i + 0.5) for i in range(round(window.seconds / seconds))]


def vitals(at: float, **more: int) -> Vitals:
    return Vitals(at, 0, {**dict.fromkeys(HELD, 3), **more}, (1.0, 2.0))


def seen(**changes):
    usual = {
        "tokens": [at for window in (BEFORE, DURING, LEFT, BURNER) for at in every(0.1, window)],
        "newcomers": [Newcomer(at, 0.2) for at in every(1.0, Window(0, 40))],
        "vitals": [vitals(at) for at in every(1.0, Window(0, 40))],
        "rss": [(at, 100 * 2**20) for at in every(0.1, Window(0, 40))],
    }
    return Seen(**{**usual, **changes})


def judge(found: Seen, thresholds: Thresholds | None = None, bound: int = 200 * 2**20):
    return judged(found, PHASES, bound, thresholds or Thresholds(), {}, [])


def test_an_attack_that_nobody_notices_is_passed():
    row = judge(seen())
    assert row.failed == []
    assert row.values["passed"]
    assert row.values["honest_share"] == 1.0
    assert row.values["newcomers_in"] == 1.0


def test_the_keys_that_readers_count_on_are_there():
    keys = {"honest_share", "p95_ratio", "newcomers_in", "rss_within_bound", "nothing_left"}
    assert keys <= judge(seen()).values.keys()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": [*every(0.1, BURNER), *every(0.2, DURING)]}, "0.5 of its speed"),
        ({"tokens": [*every(0.1, BURNER)]}, "0.0 of its speed"),
        ({"newcomers": [Newcomer(12, 1.5), Newcomer(13, 0.2)]}, "0.5 were let in"),
        ({"newcomers": []}, "of the newcomers None"),
        ({"rss": [(15.0, 201 * 2**20)]}, "201.0 MiB resident"),
        (
            {"vitals": [*map(vitals, every(1, BEFORE)), vitals(27, streams=9), vitals(28, streams=7)]},
            "streams",
        ),
    ],
)
def test_an_attack_that_hurts_somebody_fails_at_its_threshold(changes, words):
    assert any(words in failed for failed in judge(seen(**changes)).failed)


def test_one_long_pause_is_found_by_the_latency_and_not_by_the_share_alone():
    tokens = [*every(0.1, BURNER), *every(0.02, Window(10, 12)), *every(0.1, Window(17, 20))]
    row = judge(seen(tokens=[*tokens, *[10 + 0.55 * i for i in range(20)]]))
    assert row.values["honest_share"] > 1
    assert any("p95" in failed for failed in row.failed)


def test_a_client_that_has_not_recovered_is_compared_with_the_time_before():
    row = judge(seen(tokens=[*every(0.1, BEFORE), *every(0.2, DURING), *every(0.5, BURNER)]))
    assert row.values["honest_share"] == 0.5
    assert any("not recovered" in failed for failed in row.failed)


def test_a_wait_that_is_not_over_at_the_end_of_a_window_counts():
    assert latencies([1.0, 2.0], Window(0, 10)) == [1.0, 1.0, 8.0]
    assert latencies([], Window(0, 10)) == [10]
    assert latencies([-1.0, 2.0], Window(0, 3)) == [3.0]


def test_a_percentile_is_one_of_the_values():
    assert percentile([5.0, 1.0, 3.0], 0.5) == 3.0
    assert percentile([1.0, 2.0], 0.95) == 2.0
    assert percentile([1.0], 0.0) == 1.0
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_a_rate_counts_the_moments_of_its_window():
    assert rate([-1, 0, 1, 2, 9.9, 10], Window(0, 10)) == 0.4


def test_newcomers_that_were_let_in_late_or_never_are_not_let_in():
    came = [Newcomer(0, 0.9), Newcomer(1, 1.0), Newcomer(2, 1.1), Newcomer(3, None, "refused")]
    assert share_in_time(came) == 0.5
    assert share_in_time([]) is None


def test_what_comes_and_goes_is_not_left_over():
    before = [vitals(0, streams=2), vitals(1, streams=5)]
    assert left_over(before, [vitals(9, streams=5), vitals(10, streams=9)]) == {}
    assert left_over(before, [vitals(9, streams=6), vitals(10, streams=9)]) == {"streams": (5, 6)}
    assert "moments" in left_over(before, [])


def test_every_attack_is_listed_in_a_line_of_its_own():
    lines = listing().splitlines()
    assert len(lines) == len(ATTACKS) >= 20
    assert all(len(line.split()) > 3 and line.endswith((".", ").")) for line in lines)


def test_the_command_line_knows_its_attacks(capsys):
    assert parse(["where_flood"]).attacks == ["where_flood"]
    assert addresses_of(parse(["--all"])) == "local"
    assert addresses_of(parse(["--all", "--inside", "--one-address"])) == "public, one for all"
    for wrong in (["no_such_attack"], []):
        with pytest.raises(SystemExit):
            parse(wrong)
    assert "no_such_attack" in capsys.readouterr().err


def test_a_row_is_told_in_words():
    more = {"attacker_cpu_share": 0.5, "others_during": 0.1, "others_burner": 0.2}
    words = told({"attack": "flood", **judge(seen()).values, **more})
    assert "10% of the cores" in words
    assert words.endswith("held")
    assert told({"attack": "flood", "failed": ["the node died"], "passed": False}).endswith("the node died")


ABOUT = {"cpu": "a processor", "cores": 2, "day": "2026-01-01", "others": 0.0}


def test_rows_stand_in_the_table_of_the_page():
    row = {"attack": "where_flood", **judge(seen()).values, "machine": ABOUT, "commit": "c"}
    broken = {"attack": "lie_stall", "failed": ["it did not begin"], "passed": False, "machine": ABOUT}
    block = hostile_block({"hostile": [row, broken]})
    assert "| `where_flood` | 1.00 | 1.00 | 1.00 | 0.20 | 100, 100, 100 | 2 | yes | yes |" in block
    assert "| `lie_stall` | not measured: it did not begin |" in block


def test_a_long_run_stands_in_the_table_of_the_page():
    grown = growth([Sample(float(at), 500.0, 30.0, 40.0, 9.0) for at in range(100)], 10)
    run = {
        "servers": [{"who": "server of blocks 0:15", **grown}], "minutes": 30, "restarts": 4,
        "killed_clients": 2, "machine": ABOUT,
    }  # fmt: skip
    block = soak_block({"soak": run})
    assert "| server of blocks 0:15 | 500, 500 (+0.00) | 30, 30 (+0.00) | 40, 40 (+0.00) |" in block
    assert "30 minutes, 4 restarts" in block


def test_nobody_but_this_machine_is_attacked():
    assert target_of(f"/ip4/127.0.0.1/tcp/7/p2p/{PEER}").port == 7
    with pytest.raises(ValueError, match="not on this machine"):
        target_of(f"/ip4/192.0.2.1/tcp/7/p2p/{PEER}")
