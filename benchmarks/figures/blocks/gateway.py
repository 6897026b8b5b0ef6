"""Blocks about the gateway and its metrics."""

from __future__ import annotations

from benchmarks.figures.tables import Figures, markdown_table, with_note, yes


def gateway_block(figures: Figures) -> str:
    """A gateway next to a client without one."""
    run = figures["gateway"]
    rows = [
        ("tokens/s of `swarm.generate`, 1 and 16 at a time",
         f"{run['direct_tokens_per_s_1']:.1f}, {run['direct_tokens_per_s_16']:.1f}"),
        ("share of it through the gateway, 1 and 16 clients",
         f"{run['share_of_direct_1']:.2f}, {run['share_of_direct_16']:.2f}"),
        ("first token of `swarm.generate`, ms", f"{run['ttft_direct_ms']:.0f}"),
        ("through the gateway, + ms", f"{run['ttft_extra_ms']:.1f}"),
        ("last computed token after a caller has gone, s", f"{run['cancelled_after_s']:.2f}"),
        ("longest pause of `swarm.generate` where a server is killed, s", f"{run['recovery_s']:.2f}"),
        ("longest pause of a stream where a server is killed, s", f"{run['kill_gap_s']:.2f}"),
        ("the stream's pause less the other, s", f"{run['kill_gap_extra_s']:.3f}"),
        ("first token of a chat's fifth turn, x of its first turn", f"{run['turn_5_of_turn_1']:.2f}"),
        ("equal tokens", yes(run["tokens_equal"])),
    ]  # fmt: skip
    return with_note(
        markdown_table(["a gateway, three servers"], [(name, [cell]) for name, cell in rows]), run
    )


def scrape_block(figures: Figures) -> str:
    """The time of a scrape in a large swarm."""
    run = figures["scrape"]
    rows = [
        (
            name,
            [
                f"{run[f'{key}_text_ms']:.1f}",
                f"{run[f'{key}_openmetrics_ms']:.1f}",
                f"{run[f'{key}_bytes']:,.0f}",
            ],
        )
        for name, key in (("a node", "node"), ("a gateway", "gateway"))
    ]
    head = [f"{run['servers']:.0f} servers: text, ms", "OpenMetrics, ms", "bytes"]
    return with_note(markdown_table(head, rows), run)
