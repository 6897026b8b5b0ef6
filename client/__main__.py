"""The command line of a client, and nothing else: flags to calls, errors to one line and an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

from client.arguments import add_servers, add_swarm
from node.runtime.arguments import Parser, command_first, one_address_each, positive, seconds, with_peers
from node.runtime.console import argument_text, fail, run_command, run_process
from node.runtime.interrupts import let_interrupts_through
from node.runtime.logs import set_up_logging

EPILOG = """\
examples:
  python -m client generate --peers /ip4/127.0.0.1/tcp/31330/p2p/12D3... "The capital of France is"
  python -m client chat --peers /ip4/127.0.0.1/tcp/31330/p2p/12D3... --temperature 0.7

exit codes: 0, 2 for what you must fix, 3 when the swarm cannot serve the model now, 4 when its peers failed
"""


COMMANDS = ("generate", "chat", "adapters", "gateway")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    words = command_first(one_address_each(sys.argv[1:] if arguments is None else arguments), COMMANDS)
    return run_command(partial(_command, words))


def parsers() -> list[Parser]:
    """The parser of each command."""
    from client.gateway import arguments as gateway
    from client.sharing import arguments as sharing

    return [_parser(), sharing.adapters_parser(parsers), gateway.parser(parsers)]


def _parser() -> Parser:
    parser = Parser(
        prog="python -m client",
        description="Use a swarm: generate text, chat, share adapters, or serve OpenAI's API.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        family=parsers,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    generate = commands.add_parser("generate", help="continue a prompt")
    generate.add_argument("prompt", help="the text to continue; - reads it from standard input")
    generate.add_argument("--json", action="store_true", help="print one JSON object at the end")
    generate.add_argument(
        "--show-route",
        action="store_true",
        help="print the route and its events (on standard error)",
    )
    generate.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text")
    chat = commands.add_parser("chat", help="chat with the model; the caches stay in one session")
    chat.add_argument("--system", metavar="TEXT", help="the system message: the role of the model")
    chat.add_argument(
        "--max-length",
        type=positive,
        metavar="N",
        help="tokens of the chat: beyond them it drops its oldest turns (default: as model and swarm allow)",
    )
    generate.add_argument(
        "--top-logprobs",
        type=int,
        metavar="N",
        help="with --json: log probabilities, of N others too",
    )
    commands.add_parser("adapters", help="list, show, fetch and give shared adapters", add_help=False)
    commands.add_parser("gateway", help="serve OpenAI's HTTP API, and a page", add_help=False)
    for command, tokens in ((generate, None), (chat, 256)):
        _add_options(command, tokens)
    return parser


def _command(words: list[str]) -> int:
    if words[:1] == ["adapters"]:
        from client.sharing.arguments import run_adapters

        return run_adapters(words[1:], parsers)
    if words[:1] == ["gateway"]:
        from client.gateway.arguments import run_gateway

        return run_gateway(words[1:], parsers)
    flags = _parser().parse_args(words)
    set_up_logging("text")
    try:
        return _run(_with_texts(flags))
    except ValueError as error:
        return fail(error, 2)


def _with_texts(flags: argparse.Namespace) -> argparse.Namespace:
    """The flags, with text in place of the bytes that the model will see.  Raises ValueError."""
    texts: dict[str, str | list[str] | None] = {
        "bad_word": [argument_text(word, "--bad-word") for word in flags.bad_word or ()] or None
    }
    if flags.command == "generate":
        texts["prompt"] = argument_text(flags.prompt, "the prompt")
        texts["stop"] = [argument_text(stop, "--stop") for stop in flags.stop]
    elif flags.system is not None:
        texts["system"] = argument_text(flags.system, "--system")
    return argparse.Namespace(**{**vars(flags), **texts})


def _run(flags: argparse.Namespace) -> int:
    from client.terminal import run_chat, run_generate
    from node.runtime.nurseries import run
    from routing.chains.hops import NoChain
    from tensor_codec.errors import PeerFault, Refused

    commands: dict[str, Callable[[argparse.Namespace], Awaitable[None]]] = {
        "generate": run_generate,
        "chat": run_chat,
    }
    let_interrupts_through()
    flags = with_peers(flags)
    try:
        run(partial(commands[flags.command], flags))
    except NoChain as error:
        return fail(error, 3)
    except (PeerFault, Refused) as error:
        return fail(error, 4)
    return 0


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    sampling = parser.add_argument_group(
        "sampling", "The model's generation_config.json sets the options that are not given."
    )
    ways = sampling.add_mutually_exclusive_group()
    ways.add_argument(
        "--greedy", action="store_true", help="always the likeliest token; penalties and bans stay"
    )
    ways.add_argument("--temperature", type=float, metavar="T", help="draw tokens; 0 is --greedy")
    sampling.add_argument(
        "--top-k", type=int, metavar="K", help="among the K likeliest (default: 50, 0: all)"
    )
    sampling.add_argument("--top-p", type=float, metavar="P", help="among the likeliest that sum to P")
    sampling.add_argument(
        "--min-p", type=float, metavar="P", help="among those P times as likely as the first"
    )
    sampling.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1: repeat less")
    sampling.add_argument("--presence-penalty", type=float, metavar="X", help="-2 to 2, above 0: new words")
    sampling.add_argument(
        "--frequency-penalty", type=float, metavar="X", help="-2 to 2, by the count of each token"
    )
    sampling.add_argument("--no-repeat-ngram-size", type=int, metavar="N", help="no N tokens in a row twice")
    sampling.add_argument("--min-new-tokens", type=int, metavar="N", help="no end before")
    sampling.add_argument(
        "--bad-word", action="append", metavar="TEXT", help="never this; may be given again"
    )
    sampling.add_argument(
        "--stop-token-id", type=int, action="append", metavar="ID", help="end at this token"
    )
    sampling.add_argument("--show-special-tokens", action="store_true", help="in the text")
    sampling.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")
    sampling.add_argument(
        "--no-generation-config",
        action="store_true",
        help="take the end tokens alone from generation_config.json; greedy without other flags",
    )


def _add_options(parser: Parser, tokens: int | None) -> None:
    add_swarm(parser)
    default = f"{tokens}" if tokens else "what the model's generation_config.json says, else 64"
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        default=tokens,
        metavar="N",
        help=f"in one answer (default: {default})",
    )
    parser.add_argument(
        "--adapter",
        metavar="NAME",
        help="compute with this adapter: a name that servers keep, a folder of peft, or a hub's org/name",
    )
    _add_sampling(parser)
    parser.add_argument(
        "--speculate", metavar="HOW",
        help="guess tokens, for speed alone: auto, lookup, off, or the folder or name of a small model with"
        " the same tokenizer (default: off)",
    )  # fmt: skip
    parser.add_argument(
        "--wait", type=seconds, default=30.0, metavar="SECONDS", help="for a complete swarm (default: 30)"
    )
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="write the events of the session, one JSON object a line"
    )
    add_servers(parser)


if __name__ == "__main__":
    run_process(main)
