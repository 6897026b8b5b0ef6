"""The cost of rounded weights and of each codec between machines: perplexity, and distance from float32.

    python -m benchmarks quality
    python -m benchmarks quality --quantize int8 nf4 --dtype bfloat16 --json quality.json
    python -m benchmarks quality --boundaries 1 4              # codecs between machines, in place of weights

The text is the first chapter of Jane Austen's "Pride and Prejudice" (1813), in quality.txt next to this
file.  All blocks run as one span.  Embedding and head stay in float32, so only the rounding of the blocks'
weights and activations differs.

With --boundaries the weights stay in float32, and hidden states are encoded and decoded between parts of
(nearly) equal numbers of blocks: one boundary is that between two machines.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.lib.results import Run
from node.model.blocks.span import DTYPES, Span, load_span
from node.model.checkpoint.folder import ModelFolder
from node.model.checkpoint.info import read_info
from node.model.checkpoint.source import cache_dir, resolve
from node.model.embed_and_head import EmbedAndHead, load_embed_and_head
from node.runtime.arguments import device as device_argument
from node.runtime.arguments import positive
from tensor_codec.codecs import decode_rows, encode_hidden
from tensor_codec.messages.contract import CODECS, vector_bytes
from tensor_codec.span_spec import QUANTIZE

TEXT = Path(__file__).with_name("quality.txt")


@dataclass(frozen=True, slots=True)
class Row:
    """One way to keep the weights.

    name: "float32", "bfloat16", or the quantisation.  computes: the dtype of the activations.
    weights_mib: of all blocks.  kl: mean divergence of its predictions from those of float32, in nats a
    token.  same_best: share of positions with an equal likeliest token.
    """

    name: str
    computes: str
    weights_mib: float
    perplexity: float
    kl: float
    same_best: float


@dataclass(frozen=True, slots=True)
class CodecRow:
    """One codec at every boundary between parts of the model; perplexity, kl and same_best as in Row.

    bytes_per_value: on the wire.
    """

    codec: str
    boundaries: int
    bytes_per_value: float
    perplexity: float
    kl: float
    same_best: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks quality")
    parser.add_argument("--model", help="a folder or a name (default: the built-in model)")
    parser.add_argument(
        "--quantize", nargs="+", choices=QUANTIZE[1:], default=list(QUANTIZE[1:]), metavar="HOW",
        help=f"besides float32 and bfloat16: {', '.join(QUANTIZE[1:])} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default="float32",
        help="of what is not quantised (default: float32)",
    )
    parser.add_argument(
        "--boundaries", nargs="+", type=positive, default=[], metavar="N",
        help="each codec at so many boundaries between machines, in place of weights",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", type=device_argument)
    parser.add_argument("--tokens", type=int, default=512, help="of the text that are used (default: 512)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    flags, run = parser.parse_args(arguments), Run()
    torch.set_num_threads(flags.threads)
    folder = resolve(flags.model, cache_dir=cache_dir())
    ends = load_embed_and_head(folder)
    ids = torch.tensor([ends.tokenizer(TEXT.read_text()).input_ids[: flags.tokens]])
    if flags.boundaries:
        print(f"{folder.name}, {ids.shape[1]} tokens of text")
        codec_rows = compare_codecs(folder, ends, ids, flags.boundaries, flags.device)
        run.write(flags.json, [asdict(row) for row in codec_rows])
        return 0
    ways = [("float32", "float32", "none"), ("bfloat16", "bfloat16", "none")]
    ways += [(how, flags.dtype, how) for how in flags.quantize]
    print(f"{folder.name}, {ids.shape[1]} tokens of text")
    print(f"{'weights':10} {'computes in':12} {'MiB':>7} {'perplexity':>11} {'KL':>9} {'same best':>10}")
    rows: list[Row] = []
    exact: Tensor | None = None
    for name, dtype, quantize in ways:
        logits, computes, nbytes = answers(folder, ends, ids, dtype, quantize, flags.device)
        exact = logits if exact is None else exact
        row = Row(name, computes, nbytes / 2**20, perplexity(logits, ids), *distance(exact, logits))
        rows.append(row)
        print(
            f"{row.name:10} {row.computes:12} {row.weights_mib:7.1f} {row.perplexity:11.3f}"
            f" {row.kl:9.1e} {row.same_best:10.3f}",
            flush=True,
        )
    run.write(flags.json, [asdict(row) for row in rows])
    return 0


@torch.inference_mode()
def answers(
    folder: ModelFolder, ends: EmbedAndHead, ids: Tensor, dtype: str, quantize: str, device: str
) -> tuple[Tensor, str, int]:
    """Logits [1, tokens, vocab_size], the dtype of the computation, and the bytes of the weights."""
    blocks = read_info(folder).blocks
    span = load_span(folder, 0, blocks, dtype=DTYPES[dtype], device=device, quantize=quantize)
    cache = span.new_cache(1, ids.shape[1])
    hidden = span.forward(ends.embed(ids, 0), cache, 0)
    return ends.head(hidden), str(span.dtype).removeprefix("torch."), span.nbytes


@torch.inference_mode()
def compare_codecs(
    folder: ModelFolder, ends: EmbedAndHead, ids: Tensor, boundaries: Sequence[int], device: str
) -> list[CodecRow]:
    """A row for each codec and number of boundaries; prints each."""
    info = read_info(folder)
    span = load_span(folder, 0, info.blocks, dtype=torch.float32, device=device, quantize="none")
    print(f"{'codec':8} {'boundaries':>10} {'bytes':>6} {'perplexity':>11} {'KL':>9} {'same best':>10}")
    exact = answers_over(span, ends, ids, [0, info.blocks], "fp32")
    rows: list[CodecRow] = []
    for codec in sorted(CODECS):
        for count in boundaries:
            parts = [info.blocks * part // (count + 1) for part in range(count + 2)]
            logits = answers_over(span, ends, ids, parts, codec)
            size = vector_bytes(codec, info.hidden_size) / info.hidden_size
            row = CodecRow(codec, count, size, perplexity(logits, ids), *distance(exact, logits))
            rows.append(row)
            print(
                f"{row.codec:8} {row.boundaries:10} {row.bytes_per_value:6.3f} {row.perplexity:11.3f}"
                f" {row.kl:9.1e} {row.same_best:10.3f}",
                flush=True,
            )
    return rows


def answers_over(span: Span, ends: EmbedAndHead, ids: Tensor, parts: Sequence[int], codec: str) -> Tensor:
    """Logits [1, tokens, vocab_size], with hidden states in `codec` between parts of the span.

    parts: the first block of each, and the end of the last one.
    """
    hidden = ends.embed(ids, 0)
    for start, stop in pairwise(parts):
        if start:
            body = encode_hidden(hidden, codec)
            hidden = decode_rows(body, codec, hidden.shape[-1]).view(hidden.shape).float()
        hidden = span.forward(hidden, span.new_cache(1, ids.shape[1]), 0, start, stop)
    return ends.head(hidden.float())


def perplexity(logits: Tensor, ids: Tensor) -> float:
    """exp of the mean loss of each token but the first.  logits [1, tokens, vocabulary], ids [1, tokens]."""
    return float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).exp())


def distance(exact: Tensor, logits: Tensor) -> tuple[float, float]:
    """Mean KL(exact || logits) over the positions, in nats, and the share with an equal best token."""
    reference, other = exact[0].log_softmax(-1), logits[0].log_softmax(-1)
    kl = (reference.exp() * (reference - other)).sum(-1).mean()
    return max(float(kl), 0.0), float((exact.argmax(-1) == logits.argmax(-1)).float().mean())
