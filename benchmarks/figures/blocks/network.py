"""Blocks about links and about the wire."""

from __future__ import annotations

from typing import Any

from benchmarks.figures.tables import Figures, column, markdown_table, with_note, yes

SIZES = ("1 KiB", "4 KiB", "64 KiB")


def wan_block(figures: Figures) -> str:
    """Decoding and prefill over several sorts of link."""
    runs = figures["wan"]
    rows = [
        ("tokens equal to transformers'", [yes(run["tokens_equal"]) for run in runs]),
        ("steps/s", column(runs, "{steps_per_s:.3g}")),
        ("limit, steps/s", column(runs, "{limit_steps_per_s:.3g}")),
        ("share of the limit", column(runs, "{share_of_limit:.2f}")),
        ("a step beyond the limit, ms", column(runs, "{outside_ms:.1f}")),
        ("time to first token, s", column(runs, "{ttft_s:.2f}")),
        ("prefill, tokens/s", column(runs, "{prefill_tokens_per_s:.0f}")),
        ("prefill ratio", column(runs, "{prefill_ratio:.2f}")),
    ]
    return with_note(markdown_table([link_name(run) for run in runs], rows), *runs)


def wan_codecs_block(figures: Figures) -> str:
    """A prompt and tokens over slow links, with and without int8o."""
    runs = [figures[f"wan-{codec}{blocks}"] for blocks in ("", "-3") for codec in ("bf16", "fast")]
    rows = [
        ("prefill, s", column(runs, "{prefill_seconds:.2f}")),
        ("its limit by the links alone, s", column(runs, "{prefill_limit_s:.2f}")),
        ("the slowest hop computes, s", column(runs, "{prefill_slowest_hop_s:.2f}")),
        ("prefill, tokens/s", column(runs, "{prefill_tokens_per_s:.0f}")),
        ("steps/s", column(runs, "{steps_per_s:.3g}")),
        ("bytes of a token, all links", column(runs, "{token_bytes}")),
    ]
    names = [f"{where}, {codec}" for where in ("30 blocks", "3 blocks") for codec in ("bf16", "fast")]
    return with_note(markdown_table(names, rows), *runs)


def link_name(run: Any) -> str:
    """A sort of link in a few words."""
    if not run["proxied"]:
        return "no proxy"
    if not run["rtt_ms"] and run["mbit"] is None:
        return "no delay"
    rate = run["mbit"]
    return f"{run['rtt_ms']:g} ms" + ("" if rate is None else f", {rate:g} Mbit/s")


def wan_bulk_block(figures: Figures) -> str:
    """A client that decodes, alone and next to a client that prefills all the time."""
    run = figures["wan-bulk"]
    names = (
        ("steps/s", "steps_per_s", ".1f"),
        ("of a step, on the network, ms", "network_ms", ".0f"),
        ("of a step, in queues of servers, ms", "queue_ms", ".0f"),
        ("of a step, computing, ms", "computing_ms", ".0f"),
    )
    rows = [(name, [f"{run[key]:{form}}", f"{run[f'bulk_{key}']:{form}}"]) for name, key, form in names]
    rows.append(("share of the steps/s alone", ["", f"{run['bulk_share']:.2f}"]))
    rows.append(("the bulk's own tokens/s", ["", f"{run['bulk_tokens_per_s']:.0f}"]))
    head = [f"{run['servers']} servers, {link_name(run)}: alone", "with the bulk"]
    return with_note(markdown_table(head, rows), run)


def wan_speculate_block(figures: Figures) -> str:
    """Guessed tokens for three texts, over links without delay and long ones."""
    texts, rtts = ("code", "summary", "story"), ("0", "100")
    runs = [figures[f"wan-{text}-{rtt}"] for text in texts for rtt in rtts]
    rows = [
        ("tokens equal to transformers'", [yes(run["tokens_equal"]) for run in runs]),
        ("tokens/s without guesses", column(runs, "{plain_tokens_per_s:.3g}")),
        ("tokens/s with guesses", column(runs, "{speculate_tokens_per_s:.3g}")),
        ("gain", column(runs, "{gain:.2f}")),
        ("tokens of a step", column(runs, "{tokens_per_step:.2f}")),
    ]
    names = [f"{text}, {rtt} ms" for text in texts for rtt in rtts]
    return with_note(markdown_table(names, rows), *runs)


def wire_block(figures: Figures) -> str:
    """Frames through our host and through py-libp2p's own."""
    run = figures["wire"]
    both = [run["ours"], run["stock"]]
    rows = [
        (
            f"{size}, median (p10, p90), us",
            [f"{one[f'{size} median us']:.0f} ({one[f'{size} p10 us']:.0f}, {one[f'{size} p90 us']:.0f})"
             for one in both],
        )
        for size in SIZES
    ]  # fmt: skip
    rows.append(("bulk, MB/s", [f"{one['bulk MB/s']:.0f}" for one in both]))
    rows.append(
        ("1 KiB during bulk, median us", [f"{one['1 KiB median us beside bulk']:.0f}" for one in both])
    )
    return with_note(markdown_table(["ours", "py-libp2p's own"], rows), run)


def wire_line_block(figures: Figures) -> str:
    """A transfer over a line with a delay, through our host and through raw TCP."""
    runs = [figures[f"wire-rtt{line}"] for line in ("40", "160", "160-reno")]
    keys = [
        f"{prefix}{key}"
        for prefix in ("", "second_", "paused_")
        for key in ("transfer_ms", "raw_tcp_ms", "ratio")
    ]
    rows = [(f"`{key}`", [f"{run[key]:,}" for run in runs]) for key in keys]
    head = [f"{run['rtt_ms']:g} ms, {run['mbit']:g} Mbit/s, {run['congestion_control']}" for run in runs]
    return with_note(markdown_table(head, rows), *runs)


def reach_block(figures: Figures) -> str:
    """Nodes behind NAT: circuits, punches, a relay's cost, the time until a node is of use."""
    run = figures["reach"]
    punches = ", ".join(f"{pair} {worked} of {run['rounds']}" for pair, worked in run["punches"].items())
    rows = [
        (f"`{key}`", ["none" if run[key] is None else f"{run[key]:{form}}"])
        for key, form in (
            ("circuit_ms", ",.0f"), ("punched_ms", ",.0f"), ("punch_success", ".2f"),
            ("relayed_extra_ms", ".2f"), ("relay_mb_s", ",.0f"), ("transfer_ratio", ".3f"),
            ("reach_known_s", ".2f"), ("usable_s", ".2f"),
        )
    ]  # fmt: skip
    rows.append(("punches that worked", [punches]))
    return with_note(markdown_table([f"{run['one_way_ms']:g} ms one way, each home"], rows), run)
