"""The block about a transformers model over a swarm."""

from __future__ import annotations

from benchmarks.figures.tables import Figures, markdown_table, with_note, yes

HF = {  # the name of a result, and its column
    "hf-1": "1 server",
    "hf-3": "3 servers",
    "hf-int8-1": "1 server, int8",
    "hf-int8-3": "3 servers, int8",
}
SHARES = {
    "greedy, of `Swarm.generate`": "greedy_share_of_generate",
    "sampled, of `Swarm.generate`": "sampled_share_of_generate",
    "the library's loop, of `Swarm.generate`": "share_of_library",
    "greedy, of the whole model in one process": "share_of_local",
    "one batch of 16 rows, of 16 generations at once": "batch_share",
    "the same with 8 lengths of padding": "padded_batch_share",
    "5 beams to greedy, of the same in one process": "beams_share",
    "forward and backward of 8 x 128, of one process": "forward_backward_share_of_plain",
}


def hf_block(figures: Figures) -> str:
    """The speed of each kind of call as a share, and the memory of the model at the client."""
    runs = [figures[name] for name in HF]
    rows = [("tokens equal to one process in float32", [yes(run["tokens_equal"]) for run in runs])]
    rows += [(name, [f"{run[key]:.2f}" for run in runs]) for name, key in SHARES.items()]
    rows.append(("gradient, largest error", [f"{run['gradient_error']:.0e}" for run in runs]))
    rows.append(("greedy, tokens/s", [f"{run['tokens_per_s']:.1f}" for run in runs]))
    rows.append(("client, MiB", [f"{run['client_rss_mib']:.0f}" for run in runs]))
    rows.append(("added by the model, MiB", [f"{run['model_rss_mib']:.0f}" for run in runs]))
    return with_note(markdown_table(list(HF.values()), rows), *runs)
