"""Forward and backward over a swarm of processes here, beside plain transformers in one process.

    python -m benchmarks training --servers 3 [--no-tape] [--dtype bfloat16]

A step is a batch of tokens through the whole model, its loss, and the gradient back to the embeddings.  The
swarm and the one process alternate in each round, so that a noisy machine is noisy for both; a share is the
median over the rounds of one time divided by the other.  The first round warms up and does not count.

share_of_plain: tokens a second of the swarm, to the one process.  blocks_share_of_plain: the same of the
blocks alone, without embeddings, head and loss.  gradients_equal: in float32, whether the gradient is that of
the one process, within 1e-6 of its norm; in other dtypes, whether it is as near to float32 as that of the one
process in this dtype.  With tapes: whether it is that of a second backward, without a tape, in every bit too.
lora_share: of the blocks with an adapter of rank 8 on queries and values that is trained, to those without.
scheduled_share: of a model, with the measured seconds, of a swarm with one machine for each server.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks.hf.hf import alternate, share
from benchmarks.lib.processes import LocalSwarm, equal_spans, local_swarm
from benchmarks.lib.results import Run
from node.config import ConfigError
from node.model.checkpoint.info import read_info
from node.model.checkpoint.source import cache_dir, resolve

TOLERANCE = 1e-6
SCHEDULED = (1, 2, 3, 4, 6)  # servers, each a machine of its own
Call = Callable[[], Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if the gradients differ, 2 if this machine cannot run it."""
    flags = parse(arguments)
    try:
        folder = resolve(flags.model, cache_dir=cache_dir())
        spans = equal_spans(read_info(folder).blocks, flags.servers)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    threads = {"OMP_NUM_THREADS": str(flags.threads)}
    common = ["--dtype", flags.dtype, "--threads", str(flags.threads), "--quantize", flags.quantize]
    common += [] if flags.tape else ["--tape-bytes", "0"]
    with local_swarm(common, environment=threads) as swarm:
        swarm.start_spans(spans, *([] if flags.model is None else [flags.model]))
        run = Run()
        result = measure(flags, swarm, folder.path)
    for key, value in result.items():
        print(f"{key:34} {value:.4g}" if isinstance(value, float) else f"{key:34} {value}")
    run.write(flags.json, result)
    return 0 if result["gradients_equal"] else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks training", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", help="a folder or a name (default: the built-in model)")
    parser.add_argument("--servers", type=int, default=1, help="nodes, with equal spans (%(default)s)")
    parser.add_argument("--tape", action=argparse.BooleanOptionalAction, default=True, help="of the nodes")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--quantize", default="none", choices=("none", "int8", "nf4"), help="of the nodes")
    parser.add_argument(
        "--lora", action="store_true", help="measure blocks with an adapter that is trained too"
    )
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="of a row (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in each process (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="that count (%(default)s)")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args(arguments)


def measure(flags: argparse.Namespace, nodes: LocalSwarm, path: Any) -> dict[str, Any]:
    """All figures of one swarm."""
    import torch
    from transformers import AutoModelForCausalLM

    import client
    from client.hf import from_swarm

    torch.set_num_threads(flags.threads)
    dtype = getattr(torch, flags.dtype)
    with client.connect_sync(flags.model, peers=nodes.peers, threads=flags.threads) as swarm:
        model = from_swarm(swarm, dtype=dtype)
        local = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).requires_grad_(False)
        torch.manual_seed(1)
        ids = torch.randint(100, local.config.vocab_size - 100, (flags.rows, flags.tokens))
        hidden, grad = torch.randn(2, flags.rows, flags.tokens, local.config.hidden_size)
        calls: dict[str, Call] = {
            "plain": lambda: step(local, local, ids),
            "swarm": lambda: step(model, local, ids),
            "plain blocks": lambda: blocks_of_one_process(local, hidden.to(dtype), grad.to(dtype)),
            "blocks": lambda: blocks_of_a_swarm(swarm, hidden, grad),
        }
        if flags.servers == 1:
            calls["small"] = partial(in_small_requests, flags, swarm, hidden, grad)
        if flags.lora:
            calls["lora"] = partial(blocks_with_lora, swarm, hidden, grad, lora(swarm))
        seconds, answers = alternate(calls, flags.rounds)
        found = about(flags, seconds)
        found |= gradients(flags, answers, path, ids)
        if flags.tape:
            found["tape_equal"] = tape_equal(swarm, hidden, grad)
            found["gradients_equal"] &= found["tape_equal"]
        if flags.lora:
            found["lora_share"] = share(seconds, "blocks", "lora")
        if flags.servers == 1:
            found["scheduled_share"] = scheduled(flags, seconds)
    return found


def about(flags: argparse.Namespace, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """What was measured, and the speeds."""
    tokens = flags.rows * flags.tokens
    return {
        "model": flags.model or "built-in",
        "servers": flags.servers,
        "tape": flags.tape,
        "dtype": flags.dtype,
        "quantize": flags.quantize,
        "threads": flags.threads,
        "rows": flags.rows,
        "tokens": flags.tokens,
        "share_of_plain": share(seconds, "plain", "swarm"),
        "blocks_share_of_plain": share(seconds, "plain blocks", "blocks"),
        "tokens_per_s": tokens / statistics.median(seconds["swarm"]),
        "plain_tokens_per_s": tokens / statistics.median(seconds["plain"]),
        "blocks_tokens_per_s": tokens / statistics.median(seconds["blocks"]),
        "plain_blocks_tokens_per_s": tokens / statistics.median(seconds["plain blocks"]),
    }


def step(model: Any, local: Any, ids: Any) -> Any:
    """A step of training to a gradient at the embeddings of `local`."""
    embeds = local.get_input_embeddings()(ids).requires_grad_()
    model(inputs_embeds=embeds, labels=ids).loss.backward()
    return embeds.grad


def blocks_of_one_process(local: Any, hidden: Any, grad: Any) -> Any:
    """The gradient through the blocks of the library's model; its final norm is left out."""
    import torch

    given, body = hidden.clone().requires_grad_(), local.model
    norm, body.norm = body.norm, torch.nn.Identity()
    try:
        output = body(inputs_embeds=given, use_cache=False).last_hidden_state
    finally:
        body.norm = norm
    return torch.autograd.grad(output, given, grad)[0]


def blocks_of_a_swarm(swarm: Any, hidden: Any, grad: Any) -> Any:
    """The same over a swarm."""
    _, kept = swarm.forward_kept(hidden)
    return swarm.backward(kept, grad)


def lora(swarm: Any) -> Any:
    """A new adapter of rank 8 on queries and values."""
    from client.adapters.folder import new_adapter

    return new_adapter(
        {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}, swarm
    )


def blocks_with_lora(swarm: Any, hidden: Any, grad: Any, adapter: Any) -> Any:
    """Forward and backward with an adapter that has changed since the last step, as in training.

    The servers get its values anew, and their gradients come back.
    """
    import torch

    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(1e-6)
    _, kept = swarm.forward_kept(hidden, adapter=adapter.content())
    found = swarm.gradients(kept, grad)
    assert found.adapter
    return found.hidden


def small_positions(flags: argparse.Namespace) -> int:
    """Positions of a request where a chain has several servers."""
    from client.batch_parts import positions_of_a_request

    return max(positions_of_a_request(flags.rows * flags.tokens, hops=2), int(flags.tokens))


def in_small_requests(flags: argparse.Namespace, swarm: Any, hidden: Any, grad: Any) -> Any:
    """`blocks_of_a_swarm` of one server, in requests as they are for several."""
    from client import batch_parts

    usual, batch_parts.REQUEST_POSITIONS = batch_parts.REQUEST_POSITIONS, small_positions(flags)
    try:
        return blocks_of_a_swarm(swarm, hidden, grad)
    finally:
        batch_parts.REQUEST_POSITIONS = usual


def tape_equal(swarm: Any, hidden: Any, grad: Any) -> bool:
    """Whether a backward with tapes and one without give the same bits: a tape is good for one backward."""
    import torch

    _, kept = swarm.forward_kept(hidden)
    return torch.equal(swarm.backward(kept, grad), swarm.backward(kept, grad))


def gradients(flags: argparse.Namespace, answers: dict[str, Any], path: Any, ids: Any) -> dict[str, Any]:
    """How far the gradient of the swarm is from that of one process, relative to its largest value."""
    import torch
    from transformers import AutoModelForCausalLM

    plain, found = answers["plain"].float(), answers["swarm"].float()
    difference = error(found, plain)
    result = {"gradient_difference": difference}
    if flags.dtype == "float32" and flags.quantize == "none":
        return result | {"gradients_equal": difference <= TOLERANCE}
    exact = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).requires_grad_(False)
    true = step(exact, exact, ids)
    result |= {"gradient_error": error(found, true), "plain_gradient_error": error(plain, true)}
    equal = flags.quantize != "none" or result["gradient_error"] <= 1.1 * result["plain_gradient_error"]
    return result | {"gradients_equal": equal}


def error(found: Any, expected: Any) -> float:
    """The norm of the difference, relative to that of the expected tensor."""
    return float((found - expected).norm() / expected.norm())


def scheduled(flags: argparse.Namespace, seconds: dict[str, list[float]]) -> dict[str, float]:
    """Shares of swarms with one machine for each server, by the number of servers.

    By the times of one server with all blocks: forward and backward of the batch, in large requests and in
    those for several servers, of which each does its part of the blocks.  The network takes no time.
    """
    plain, whole, small = (statistics.median(seconds[name]) for name in ("plain blocks", "blocks", "small"))
    requests = -(-flags.rows // (small_positions(flags) // flags.tokens))
    shares = {str(n): plain / schedule(requests, n, small / requests / n) for n in SCHEDULED if n > 1}
    return {"1": plain / whole, **shares}


def schedule(requests: int, servers: int, seconds: float) -> float:
    """The time of some requests through a row of servers, each with one request at a time, there and back.

    seconds: of one request at one server, both ways together.
    """
    return (requests + servers - 1) * seconds
