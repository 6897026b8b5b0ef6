"""Blocks about decoding over servers, and about starting."""

from __future__ import annotations

from typing import Any

from benchmarks.figures.tables import (
    Figures,
    column,
    described,
    markdown_table,
    measured_on,
    spread,
    with_note,
    yes,
)

SERVERS = (1, 2, 3)
SERVER_HEAD = [f"{servers} server{'s' * (servers > 1)}" for servers in SERVERS]


def demo_block(figures: Figures) -> str:
    """The output of the demo, and its machine."""
    demo = figures["demo"]
    printed = "\n".join(demo["lines"]).strip("\n")
    return f"```text\n{printed}\n```\n\nMeasured in {demo['dtype']} on {described(demo['machine'])}."


def beside_petals_block(figures: Figures) -> str:
    """Shares of transformers, each on its own machine, and the figures of Raceme."""
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
    return f"{markdown_table(SERVER_HEAD, rows)}\n\n{note}"


def decode_block(figures: Figures) -> str:
    """All figures of `benchmarks decode` in float32."""
    ours = decodes(figures)
    rows = [
        ("tokens equal", [yes(one["tokens_equal"]) for one in ours]),
        (
            "steps/s (p10, p90)",
            column(ours, "{steps_per_s:.1f} ({steps_per_s_p10:.1f}, {steps_per_s_p90:.1f})"),
        ),
        ("transformers' `generate`, steps/s", column(ours, "{reference_steps_per_s:.1f}")),
        ("share of transformers", column(ours, "{share_of_reference:.2f}")),
        ("our code in one process, steps/s", column(ours, "{same_code_steps_per_s:.1f}")),
        ("added for each server, ms", column(ours, "{hop_overhead_ms:.1f}")),
        ("on the wire, in queues and threads, for each server, ms", column(ours, "{wire_ms_per_hop:.1f}")),
        ("a hop besides its computing, ms (fastest tenth)", [hops(one) for one in ours]),
        ("the client besides the head, ms", [own(one) for one in ours]),
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
    return f"Measured on {described(ours[0]['machine'])}:\n\n{markdown_table(SERVER_HEAD, rows)}"


def hops(run: dict[str, Any]) -> str:
    """A hop besides its computing, where the run has measured it."""
    return "" if run.get("hop_ms") is None else f"{run['hop_ms']:.2f} ({run['hop_ms_p10']:.2f})"


def own(run: dict[str, Any]) -> str:
    """The client's own part of a token, where the run has measured it."""
    return "" if run.get("client_ms_per_token") is None else f"{run['client_ms_per_token']:.2f}"


def decode_int8_block(figures: Figures) -> str:
    """One client over one and three servers, and many clients over one, in int8."""
    runs = [figures[f"decode-int8-{name}"] for name in ("1", "3", "1x16")]
    head = [
        f"{run['servers']} server{'s' * (run['servers'] > 1)}"
        + (f", {run['clients']} clients" if run["clients"] > 1 else "")
        for run in runs
    ]
    alone = [run["clients"] == 1 for run in runs]
    rows = [
        ("steps/s of a client", column(runs, "{steps_per_s:.1f}")),
        ("transformers' `generate` in float32, steps/s", column(runs, "{reference_steps_per_s:.1f}")),
        (
            "share of transformers",
            [f"{r['share_of_reference']:.1f}" if one else "" for r, one in zip(runs, alone, strict=True)],
        ),
        ("new tokens/s of all clients", column(runs, "{aggregate_tokens_per_s:.0f}")),
        (
            "transformers' `generate`, new tokens/s, one stream",
            column(runs, "{reference_tokens_per_s:.1f}"),
        ),
        ("share of that", column(runs, "{aggregate_share_of_reference:.1f}")),
        ("share of the tokens before the first difference", column(runs, "{tokens_equal_share:.2f}")),
        (
            "fairness, slowest over fastest (decode steps alone)",
            [
                "" if one else f"{r['fairness']:.2f} ({r['decode_fairness']:.2f})"
                for r, one in zip(runs, alone, strict=True)
            ],
        ),
        (
            "time to first token, ms, median (largest)",
            [f"{1e3 * run['ttft_s']:.0f} ({1e3 * run['ttft_max_s']:.0f})" for run in runs],
        ),
        (
            "added for each server, ms",
            [f"{r['hop_overhead_ms']:.1f}" if one else "" for r, one in zip(runs, alone, strict=True)],
        ),
        (
            "resident, largest server / client, MiB",
            column(runs, "{server_rss_mib:.0f} / {client_rss_mib:.0f}"),
        ),
    ]
    return with_note(markdown_table(head, rows), *runs)


def flood_block(figures: Figures) -> str:
    """An honest client alone, and next to a client that floods."""
    run = figures["flood"]
    rows = [
        ("steps/s alone", [f"{run['alone_steps_per_s']:.1f}"]),
        ("steps/s during the flood", [f"{run['beside_flood_steps_per_s']:.1f}"]),
        ("share", [f"{run['share']:.2f}"]),
        ("resident memory of the node, MiB", [f"{run['node_rss_mib']:,.0f}"]),
        ("its bound, MiB", [f"{run['node_bound_mib']:,.0f}"]),
    ]
    return with_note(markdown_table([run["quantize"]], rows), run)


def startup_block(figures: Figures) -> str:
    """The time until a node is online and until a waiting client has its first token."""
    run = figures["startup"]
    rows = [
        ("a node alone is online after", [f"{run['node_alone_online_s']:.1f}"]),
        ("CPU time of its start", [f"{run['node_alone_cpu_s']:.1f}"]),
        ("the last node of the swarm is online after", [f"{run['last_node_online_s']:.1f}"]),
        (
            "the waiting client's first token, after that",
            [f"{run['first_token_after_last_node_online_s']:.2f}"],
        ),
        ("all nodes at one moment: the last one is online after", [f"{run['at_once_online_s']:.1f}"]),
        ("the same with no kernel compiled before", [f"{run['at_once_cold_online_s']:.1f}"]),
    ]
    return with_note(markdown_table([f"s, median of {len(run['runs'])} runs"], rows), run)


def black_holed_block(figures: Figures) -> str:
    """The cost of a silent server to new clients."""
    run = figures["startup-black-holed"]
    rows = [
        (
            name,
            [
                f"{1e3 * run[f'{what}_s']:.0f}",
                f"{1e3 * run[f'{what}_beside_black_holed_s']:.0f}",
                f"{run[f'{what}_more_ms']:+.0f}",
            ],
        )
        for name, what in (("until a chain is chosen", "chain"), ("to the first token", "first_token"))
    ]
    about = f"Medians of {run['clients']} clients of each kind in ms, on {measured_on([run])}:"
    return f"{about}\n\n{markdown_table(['without', 'with it', 'more'], rows)}"


def decodes(figures: Figures) -> list[Any]:
    """The runs over one, two and three servers.  ValueError where they are not of one machine and version."""
    runs = [figures[f"decode-{servers}"] for servers in SERVERS]
    measured_on(runs)
    return runs


def first_tokens(runs: list[Any]) -> list[str]:
    """Milliseconds to the first token, ours and the library's."""
    return [f"{1e3 * run['ttft_s']:.0f} ({1e3 * run['reference_ttft_s']:.0f})" for run in runs]
