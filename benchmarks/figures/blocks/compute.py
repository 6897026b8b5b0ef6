"""Blocks about the parts of a node: the executor, the event loop, the weights, the journal."""

from __future__ import annotations

from typing import Any

from benchmarks.figures.tables import Figures, column, markdown_table, with_note, yes


def executor_block(figures: Figures) -> str:
    """Sessions in one batch and one by one, by the kind of weights."""
    runs = figures["executor"]
    head = [
        "sessions", "tokens/s", "one by one", "x the library's", "ms a step", "of the floor", "of it Python",
        "prefill tokens/s",
    ]  # fmt: skip
    rows = [
        (
            weights_name(run),
            [
                f"{run['sessions']}",
                f"{run['tokens_per_s']:.1f}",
                f"{run['one_by_one_tokens_per_s']:.1f}",
                f"{run['share_of_reference']:.1f}",
                f"{run['ms_per_step']:.1f}",
                f"{run['share_of_floor']:.2f}",
                f"{100 * run['python_share']:.0f} %",
                f"{run['prefill_tokens_per_s']:.0f}",
            ],
        )
        for run in runs
    ]
    return with_note(markdown_table(head, rows), *runs)


def weights_name(run: Any) -> str:
    """The kind of weights, and the dtype of the activations where both matter."""
    return str(run["dtype"]) if run["quantize"] == "none" else f"{run['quantize']}, {run['dtype']}"


def ragged_block(figures: Figures) -> str:
    """Steps of several tokens: alone, and beside single ones."""
    runs = figures["ragged"]
    rows = [
        (
            f"{weights_name(run)}, {run['context']} positions, "
            + (f"steps of {', '.join(map(str, run['tokens']))}" if len(run["tokens"]) > 1 else
               f"a step of {run['tokens'][0]}"),
            [f"{run['ms']:.1f}", f"{run['apart_ms']:.1f}", f"{run['ratio']:.2f}"],
        )
        for run in runs
    ]  # fmt: skip
    return with_note(markdown_table(["ms in one batch", "ms apart", "x one token"], rows), *runs)


def prefill_block(figures: Figures) -> str:
    """Prompts by their length, and a step behind each."""
    runs = figures["prefill"]
    rows = [
        (
            f"{weights_name(run)}, {run['tokens']:,} tokens",
            [f"{run['seconds']:.2f}", f"{run['tokens_per_s']:.0f}", f"{run['decode_ms']:.1f}"],
        )
        for run in runs
    ]
    return with_note(markdown_table(["seconds", "tokens/s", "ms of a step behind them"], rows), *runs)


def loop_lag_block(figures: Figures) -> str:
    """The lateness of the event loop, next to an idle engine and next to a full one."""
    run = figures["loop-lag"]
    rows = [
        (f"{name}, ms", [f"{run[f'{engine}_{key}_ms']:.1f}" for engine in ("idle", "full")])
        for name, key in (("median", "p50"), ("99th percentile", "p99"), ("largest", "max"))
    ]
    head = ["idle engine", f"{run['sessions']} sessions that decode, two that prefill ({run['quantize']})"]
    return with_note(markdown_table(head, rows), run)


def quality_block(figures: Figures) -> str:
    """The cost of rounded weights."""
    runs = figures["quality"]
    rows = [
        (run["name"], [f"{run['perplexity']:.3f}", f"{run['kl']:.1e}", f"{run['same_best']:.3f}",
                       f"{run['weights_mib']:.0f}"])
        for run in runs
    ]  # fmt: skip
    return with_note(markdown_table(["perplexity", "KL", "equal likeliest token", "MiB"], rows), *runs)


def quality_codecs_block(figures: Figures) -> str:
    """The cost of codecs between machines."""
    runs = figures["quality-codecs"]
    rows = [
        (f"{run['codec']}, {run['boundaries']} boundar{'y' if run['boundaries'] == 1 else 'ies'}",
         [f"{run['bytes_per_value']:.2f}", f"{run['perplexity']:.3f}", f"{run['kl']:.1e}",
          f"{run['same_best']:.3f}"])
        for run in runs
    ]  # fmt: skip
    return with_note(
        markdown_table(["bytes a value", "perplexity", "KL", "equal likeliest token"], rows), *runs
    )


def journal_block(figures: Figures) -> str:
    """The cost of the journal."""
    run = figures["journal"]
    rows = [
        (f"a step through {run['blocks']} blocks, us", column([run], "{step_us:,.0f}")),
        ("its copy into the journal, us (p99)", column([run], "{append_us:.0f} ({append_us_p99:.0f})")),
        ("share of the step", [f"{100 * run['share_of_step']:.1f} %"]),
        ("reading back, us a token", column([run], "{read_us_per_token:.1f}")),
    ]
    return with_note(markdown_table(["median"], rows), run)


def adapters_block(figures: Figures) -> str:
    """What adapters add to a step of many rows, and to the opening of a session."""
    runs = figures["adapters"]
    rows = []
    for run in runs:
        opened = [run["cold_open_extra_ms"], run["warm_open_extra_ms"]]
        cells = [run["ms"], run["slowdown"], run["adapters_mib"], *opened]
        formats = ("{:.1f}", "{:.2f}", "{:.1f}", "{:.1f}", "{:.1f}")
        made = ["" if cell is None else form.format(cell) for cell, form in zip(cells, formats, strict=True)]
        rows.append((run["case"], made))
    head = ["a step, ms", "x a step without", "adapters, MiB", "open: first time, + ms", "again, + ms"]
    return with_note(markdown_table(head, rows), *runs)


def backward_block(figures: Figures) -> str:
    """A server's backward, by the activations that it holds."""
    run = figures["backward"]
    ways = {
        "forward": "forward",
        "backward, activations of one part held": "one_part",
        "backward, activations of half of the blocks held": "half",
        "backward, all activations held": "all",
    }
    rows = [
        (name, [f"{run[f'{key}_s']:.2f}", f"{run[f'{key}_longest_part_s']:.2f}"])
        for name, key in ways.items()
    ]
    rows.append(("memory of all activations, MiB", [f"{run['all_mib']:.0f}", ""]))
    rows.append(
        ("one position in one block, in hidden states", [f"{run['activations_of_a_position']:.1f}", ""])
    )
    start, stop = run["blocks"]
    head = [f"{run['positions']:,} positions, {stop - start} blocks: s", "longest part, s"]
    return with_note(markdown_table(head, rows), run)


TRAINING = {  # the name of a result, and its column
    "training-1": "1 server",
    "training-1-no-tape": "1 server, no tapes",
    "training-3": "3 servers",
    "training-3-no-tape": "3 servers, no tapes",
    "training-int8-1": "1 server, int8",
}


def training_block(figures: Figures) -> str:
    """Forward and backward over a swarm, beside one process."""
    runs = [figures[name] for name in TRAINING]
    heads = list(TRAINING.values())
    if (bfloat16 := figures.get("training-bfloat16-1")) is not None:  # minutes on a CPU that widens it
        runs.append(bfloat16)
        heads.append("1 server, bfloat16")
    if (lora := figures.get("training-lora-1")) is not None:
        runs.append(lora)
        heads.append("1 server, again, and with LoRA")
    rows = [
        ("gradients equal", [yes(run["gradients_equal"]) for run in runs]),
        ("a step, of one process", column(runs, "{share_of_plain:.2f}")),
        ("blocks alone, of one process", column(runs, "{blocks_share_of_plain:.2f}")),
        ("a step, tokens/s", column(runs, "{tokens_per_s:.0f}")),
        ("one process, tokens/s", column(runs, "{plain_tokens_per_s:.0f}")),
    ]
    shares = [run.get("lora_share") for run in runs]
    if any(shares):
        name = "blocks with LoRA r8 q,v, of those without"
        rows.append((name, ["" if share is None else f"{share:.2f}" for share in shares]))
    for servers in ("3", "6"):
        name = f"model: blocks with {servers} servers on machines of their own"
        shares = [run.get("scheduled_share", {}).get(servers) for run in runs]
        rows.append((name, ["" if share is None else f"{share:.2f}" for share in shares]))
    return with_note(markdown_table(heads, rows), *runs)
