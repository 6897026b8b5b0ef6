"""Flags come from the command line, the environment, a file and defaults, in this order, in every command."""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path

import pytest

import client.__main__
import node.__main__
from node.config import ConfigError
from node.runtime.arguments import Parser, positive, size
from node.runtime.settings.flags import Flag, flags_of, from_text
from node.runtime.settings.merge import of_environment

PEER = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWKnDdG3iXw9eTFijk3EWSunZcFi54Zka4wmtqtt6rPxc8"
SAMPLES = ("0:1", "3", "0.5", "20GiB", "a-word", "/ip4/127.0.0.1/tcp/1", f"{PEER.rpartition('/')[2]}=0.5")
SWITCHED_ON = "true"

COMMANDS = [
    parser
    for program in (node.__main__, client.__main__)
    for each in program.parsers()
    for parser in each.commands()
]
EVERY_FLAG = [
    pytest.param(parser, flag, id=f"{' '.join(parser.command)} --{flag.name}")
    for parser in COMMANDS
    for flag in flags_of(parser)
]


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("RACEME_")]:
        monkeypatch.delenv(name)


def required_words(parser: Parser, but: str = "") -> list[str]:
    """Words for all that a command must be given, without the flag of a test."""
    words = []
    for action in parser._actions:
        if not action.option_strings and action.nargs is None and action.dest not in ("help",):
            words.append("a-word")
        elif action.required and action.option_strings and action.dest != but:
            words.append(f"{action.option_strings[-1]}={PEER}")
    if parser.one_of and but != parser.one_of[0]:
        words.append(f"--{parser.one_of[0]}={PEER}")
    return words


def sample_of(flag: Flag) -> str | None:
    """A value that the flag takes, and that differs from its default; None where none of the samples fits."""
    if flag.is_switch:
        return SWITCHED_ON
    choices = flag.action.choices
    if choices is not None:
        return next((str(each) for each in choices if each != flag.action.default), str(flag.action.default))
    for text in SAMPLES:
        try:
            found = from_text(flag, text)
        except ValueError:
            continue
        if found != flag.action.default:
            return text
    return None


def as_toml(flag: Flag, text: str) -> str:
    if flag.is_switch:
        return text
    value = from_text(flag, text)
    first = value[0] if flag.is_list else value
    is_number = isinstance(first, int | float) and text.replace(".", "").isdigit()
    each = text if is_number else f'"{text}"'
    return f"[{each}]" if flag.is_list else each


@pytest.mark.parametrize(("parser", "flag"), EVERY_FLAG)
def test_every_flag_of_every_command_has_a_key_and_a_variable(parser, flag, tmp_path, monkeypatch):
    text = sample_of(flag)
    words = required_words(parser, flag.action.dest)
    if text is None:  # a form of its own: then at least a wrong value must be noticed
        monkeypatch.setenv(flag.variable, "no such value")
        with pytest.raises(ConfigError, match=flag.variable):
            parser.parse_args(words)
        return
    expected = from_text(flag, text)
    monkeypatch.setenv(flag.variable, text)
    assert getattr(parser.parse_args(words), flag.action.dest) == expected
    monkeypatch.delenv(flag.variable)
    file = tmp_path / "raceme.toml"
    for table in ("", f"[{'.'.join(parser.command)}]\n", f"[{parser.command[0]}]\n"):
        file.write_text(f"{table}{flag.name} = {as_toml(flag, text)}\n")
        assert getattr(parser.parse_args([*words, "--config", str(file)]), flag.action.dest) == expected
    written_otherwise = flag.name.replace("-", "_")
    file.write_text(f"{written_otherwise} = {as_toml(flag, text)}\n")
    assert getattr(parser.parse_args([*words, f"--config={file}"]), flag.action.dest) == expected
    if flag.action.dest not in ("peers", "out"):
        assert (
            getattr(parser.parse_args(words), flag.action.dest) == flag.action.default
        )  # nothing stays behind


def test_every_flag_has_a_variable_for_each_table_and_the_narrower_one_wins():
    for flag in [flag for parser in COMMANDS for flag in flags_of(parser)]:
        *narrower, widest = flag.variables
        assert narrower
        if (text := sample_of(flag)) is None:
            continue
        for variable in narrower:
            found = of_environment([flag], {widest: "no such value", variable: text})[flag.action.dest]
            assert (found.value, found.origin) == (from_text(flag, text), variable)


def test_variables_name_the_tables_of_a_file():
    action = a_parser()._actions[1]
    assert Flag("api-key", action, ("node",)).variables == ("RACEME_NODE_API_KEY", "RACEME_API_KEY")
    assert Flag("port", action, ("client", "gateway")).variables == (
        "RACEME_GATEWAY_PORT", "RACEME_CLIENT_GATEWAY_PORT", "RACEME_CLIENT_PORT", "RACEME_PORT",
    )  # fmt: skip


def test_no_variable_has_two_meanings():
    """One environment serves several programs: a variable has values that all flags of its name take."""
    by_variable: dict[str, list[Flag]] = {}
    for flag in [flag for parser in COMMANDS for flag in flags_of(parser)]:
        for variable in flag.variables:
            by_variable.setdefault(variable, []).append(flag)
    for variable, flags in by_variable.items():
        assert len({flag.name for flag in flags}) == 1, variable
        assert len({(flag.action.type, flag.is_switch, flag.action.choices is None) for flag in flags}) == 1
        assert flags[0].action.choices is None or set.intersection(
            *(set(flag.action.choices or ()) for flag in flags)
        ), f"{variable}: {[flag.action.choices for flag in flags]}"


def test_metrics_of_a_node_and_of_a_gateway_have_variables_of_their_own(monkeypatch):
    by_command = {parser.command: parser for parser in COMMANDS}
    node_s, gateway_s = by_command["node",], by_command["client", "gateway"]
    words = required_words(gateway_s)
    monkeypatch.setenv("RACEME_METRICS", "127.0.0.1:9464")
    assert node_s.parse_args([]).metrics == "127.0.0.1:9464"
    assert gateway_s.parse_args(words).metrics == "key"
    monkeypatch.setenv("RACEME_METRICS", "open")
    with pytest.raises(
        ConfigError, match=r"RACEME_METRICS is open: .* has the variable RACEME_GATEWAY_METRICS"
    ):
        gateway_s.parse_args(words)
    monkeypatch.setenv("RACEME_METRICS", "127.0.0.1:9464")
    monkeypatch.setenv("RACEME_NODE_METRICS", "127.0.0.1:9465")
    monkeypatch.setenv("RACEME_GATEWAY_METRICS", "off")
    assert node_s.parse_args([]).metrics == "127.0.0.1:9465"
    assert gateway_s.parse_args(words).metrics == "off"
    monkeypatch.setenv("RACEME_GATEWAY_METRICS", "127.0.0.1:9464")
    with pytest.raises(
        ConfigError, match=r"RACEME_GATEWAY_METRICS: '127.0.0.1:9464' is not one of open, key, off"
    ):
        gateway_s.parse_args(words)


@pytest.mark.parametrize(("parser", "flag"), EVERY_FLAG)
def test_every_flag_that_is_printed_can_be_read_again(parser, flag, tmp_path, monkeypatch, capsys):
    if (text := sample_of(flag)) is None:
        return
    expected = from_text(flag, text)
    words = required_words(parser, flag.action.dest)
    file = tmp_path / "printed.toml"
    option = flag.action.option_strings[-1:] if flag.is_switch else [f"--{flag.name}={text}"]
    for given in ([text] if not flag.action.option_strings else option, []):
        if not given:
            monkeypatch.setenv(flag.variable, text)
        with pytest.raises(SystemExit):
            parser.parse_args([*given, "--print-config"])
        file.write_text(capsys.readouterr().out)
        with monkeypatch.context() as patch:
            patch.delenv(flag.variable, raising=False)
            assert getattr(parser.parse_args([*words, f"--config={file}"]), flag.action.dest) == expected


@pytest.mark.parametrize("parser", COMMANDS, ids=lambda parser: " ".join(parser.command))
def test_the_help_of_every_command_says_which_source_wins(parser):
    text = " ".join(parser.format_help().split())
    assert "A flag's value is that of the command line, else of its environment variable" in text
    assert "--config FILE" in text
    assert "SUPPRESS" not in text
    names = [flag.name for flag in flags_of(parser)]
    assert len(names) == len(set(names))
    assert not {"cache", "torch", "no-apt"} & set(names)  # variables of another meaning


def a_parser() -> Parser:
    parser = Parser(prog="python -m node")
    parser.add_argument("model", nargs="?")
    parser.add_argument("--peers", action="append", default=[])
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--name", default="")
    parser.add_argument("--swarm-key", type=Path)
    parser.add_argument("--api-key")
    parser.add_argument("--max-disk", type=size)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-ui", dest="ui", action="store_false")
    parser.add_argument("--ids", type=int, nargs="+")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--blocks")
    which.add_argument("--num-blocks", type=positive)
    return parser


def parsed(tmp_path: Path, toml: str, *words: str) -> argparse.Namespace:
    file = tmp_path / "raceme.toml"
    file.write_text(toml)
    return a_parser().parse_args([*words, "--config", str(file)])


def test_the_command_line_wins_over_the_environment_over_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("RACEME_NAME", "of the environment")
    monkeypatch.setenv("RACEME_THREADS", "2")
    toml = 'name = "of the file"\nthreads = 1\nshare = 0.25\nmodel = "m"'
    found = parsed(tmp_path, toml, "--threads", "3")
    assert (found.threads, found.name, found.share, found.model) == (3, "of the environment", 0.25, "m")
    assert found.dtype == "float32"


def test_a_list_of_more_weight_replaces_the_other_and_does_not_add_to_it(tmp_path, monkeypatch):
    toml = 'peers = ["a", "b"]'
    assert parsed(tmp_path, toml).peers == ["a", "b"]
    assert parsed(tmp_path, toml, "--peers=c").peers == ["c"]
    monkeypatch.setenv("RACEME_PEERS", "d,e f")
    assert parsed(tmp_path, toml).peers == ["d", "e", "f"]
    monkeypatch.setenv("RACEME_PEERS", '["g, h"]')
    assert parsed(tmp_path, toml).peers == ["g, h"]
    monkeypatch.setenv("RACEME_PEERS", "")
    assert parsed(tmp_path, toml).peers == ["a", "b"]
    assert parsed(tmp_path, "ids = [1, 2]").ids == [1, 2]
    assert parsed(tmp_path, 'peers = "one"').peers == ["one"]
    assert parsed(tmp_path, "peers = []").peers == ["a", "b"][:0]


def test_a_switch_can_be_switched_off_again_by_a_source_of_more_weight(tmp_path, monkeypatch):
    assert parsed(tmp_path, "json = true\nno-ui = true").json is True
    assert parsed(tmp_path, "json = true\nno-ui = true").ui is False
    monkeypatch.setenv("RACEME_JSON", "off")
    monkeypatch.setenv("RACEME_NO_UI", "0")
    found = parsed(tmp_path, "json = true\nno-ui = true")
    assert (found.json, found.ui) == (False, True)


def test_of_flags_that_exclude_each_other_the_weightier_source_counts(tmp_path, monkeypatch):
    found = parsed(tmp_path, 'blocks = "0:1"', "--num-blocks", "3")
    assert (found.blocks, found.num_blocks) == (None, 3)
    monkeypatch.setenv("RACEME_NUM_BLOCKS", "4")
    found = parsed(tmp_path, 'blocks = "0:1"')
    assert (found.blocks, found.num_blocks) == (None, 4)
    monkeypatch.setenv("RACEME_BLOCKS", "0:2")
    with pytest.raises(ConfigError, match=r"RACEME_.*BLOCKS and RACEME_.*BLOCKS exclude each other"):
        parsed(tmp_path, "")


def test_what_a_command_must_be_given_may_stand_in_the_file(tmp_path, capsys):
    parser = Parser(prog="python -m node")
    parser.add_argument("--peers", action="append", default=[], required=True)
    file = tmp_path / "raceme.toml"
    file.write_text('peers = ["a"]')
    assert parser.parse_args(["--config", str(file)]).peers == ["a"]
    with pytest.raises(SystemExit):
        parser.parse_args([])
    assert "the following arguments are required: --peers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        (
            'blok = "0:1"',
            "blok = '0:1': python -m node has no flag --blok, see its --help; did you mean blocks?",
        ),
        ("threads = 0", "threads: '0' is not a whole number of at least 1"),
        ('threads = "four"', "threads: 'four' is not a whole number of at least 1"),
        ('threads = "4"', "threads: '4' is text, a number is needed: without quotes"),
        ("threads = 1.5", "threads: '1.5' is not a whole number of at least 1"),
        ("threads = true", "threads: true is true or false, one value is needed"),
        ("threads = [1]", "threads: [1] is an array, one value is needed"),
        ("threads = 2020-01-01", "threads: 2020-01-01 is a date or a time, one value is needed"),
        ('share = "much"', "share: 'much' is not a number"),
        ("name = 5", "name: 5 is a number, text is needed: in quotes"),
        ("swarm-key = 5", "swarm-key: 5 is a number, text is needed: in quotes"),
        ('swarm-key = "a\\u0000b"', "swarm-key: 'a\\x00b' has a character NUL"),
        ('dtype = "float8"', "dtype: 'float8' is not one of float32, bfloat16"),
        ('json = "yes"', "json: 'yes' is text, true or false is needed"),
        ("json = 1", "json: 1 is a number, true or false is needed"),
        ("peers = 5", "peers: 5 is a number, text is needed: in quotes"),
        ('peers = [["a"]]', "peers: ['a'] is an array, an array is needed"),
        ('max-disk = "20 GiBs"', "max-disk: '20 GiBs' is not a number of bytes of at least 1, as in 20GiB"),
        ('config = "other.toml"', "config = 'other.toml': python -m node has no flag --config"),
        ('swarm-key = "a"\nswarm_key = "b"', "swarm_key is there twice, as swarm-key and as swarm_key"),
        ("[sharing]\nx = 1", "[sharing] is no command's table; tables here: [client], [gateway], [node]"),
        ("[node.serv]\nx = 1", "[node.serv] is no command's table; tables here: none"),
        ('blocks = "0:1"\nnum-blocks = 1', "exclude each other: leave one out"),
        ("threads = 1\nthreads = 2", "is not TOML: Cannot overwrite a value"),
        ("threads = 1\nthreads = 2", ": a key is there twice"),
        ("[[node]]\nthreads = 1", "node = [{'threads': 1}]: [node] is a table of flags, which begins with a"),
        ("node = 5", "node = 5: [node] is a table of flags, which begins with a line [node]"),
        ("gateway = true", "gateway = true: [gateway] is a table of flags"),
        ("[node.threads]\nx = 1", "[node.threads] is no table: threads is a flag, with a value after ="),
        ("threads = {x = 1}", "[threads] is no table: threads is a flag, with a value after ="),
        ("swarm_key = {x = 1}", "[swarm_key] is no table: swarm_key is a flag"),
        ('"--threads" = 1', "--threads = 1: the key of this flag is threads"),
        ("THREADS = 1", "THREADS = 1: the key of this flag is threads"),
        ('"" = 1', '"" = 1: python -m node has no flag of this name, see its --help'),
        ('"swarm key" = "x"', "has no flag of this name, see its --help; did you mean swarm-key?"),
        ('"a\\nb" = "x"', "\"a\\nb\" = 'x': python -m node has no flag of this name"),
        ("config = true", "config = true: python -m node has no flag --config"),
        ('swarm-key = ""', "swarm-key: '' is empty, a path is needed"),
        ('swarm-key = "~nobody-of-this-name/key"', "begins with the home folder of no user"),
        ("threads", "is not TOML: "),
        ("a = " + 5000 * "[", "is not TOML that can be read: it is nested too deeply"),
        ("threads = " + 5000 * "9", "is not TOML: "),
    ],
)
def test_a_wrong_file_is_named_with_its_key_the_found_and_the_allowed_value(tmp_path, toml, expected):
    with pytest.raises(ConfigError) as caught:
        parsed(tmp_path, toml)
    message = str(caught.value)
    assert expected in message
    assert str(tmp_path / "raceme.toml") in message
    assert "\n" not in message


def test_a_wrong_variable_is_named_with_the_found_and_the_allowed_value(tmp_path, monkeypatch):
    for name, text, expected in (
        ("RACEME_THREADS", "four", "RACEME_THREADS: 'four' is not a whole number of at least 1"),
        ("RACEME_DTYPE", "int3", "RACEME_DTYPE: 'int3' is not one of float32, bfloat16"),
        ("RACEME_JSON", "maybe", "RACEME_JSON: 'maybe' is not one of 1, true, yes, on, 0, false, no, off"),
        ("RACEME_PEERS", "[1", "RACEME_PEERS: '[1' is not an array of TOML"),
        (
            "RACEME_PEERS",
            "[]\nx = 1",
            "RACEME_PEERS: '[]\\nx = 1' is not an array of TOML: something follows it",
        ),
        (
            "RACEME_SWARM_KEY",
            "~nobody-of-this-name/key",
            "RACEME_SWARM_KEY: '~nobody-of-this-name/key' begins with",
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, text)
            with pytest.raises(ConfigError) as caught:
                a_parser().parse_args([])
        assert expected in str(caught.value)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "latin.toml").write_bytes(b'name = "caf\xe9"')
    (tmp_path / "large.toml").write_bytes(b"#" * (1 << 21))
    for name, expected in (
        ("none.toml", "No such file or directory"),
        ("", "Is a directory"),
        ("latin.toml", "byte 12 is not UTF-8"),
        ("large.toml", "has more than 1048576 bytes"),
    ):
        with pytest.raises(ConfigError, match=expected):
            a_parser().parse_args(["--config", str(tmp_path / name)])
    monkeypatch.setenv("RACEME_CONFIG", str(tmp_path / "none.toml"))
    with pytest.raises(ConfigError, match="No such file"):
        a_parser().parse_args([])


FLEET = """
swarm-key = "swarm.key"

[node]
peers = ["a"]
threads = 2
blocks = "0:1"

[node.status]
peers = ["b"]

[gateway]
any-key-of-another-program = 1
"""


def test_one_file_serves_several_commands_and_the_narrower_table_wins(tmp_path):
    file = tmp_path / "fleet.toml"
    file.write_text(FLEET)
    by_command = {parser.command: parser for parser in COMMANDS}
    serving = by_command["node",].parse_args(["--config", str(file)])
    assert (serving.peers, serving.threads, serving.swarm_key) == (["a"], 2, Path("swarm.key"))
    status = by_command["node", "status"].parse_args(["--config", str(file)])
    assert (status.peers, status.swarm_key) == (["b"], Path("swarm.key"))
    bootstrap = by_command["node", "bootstrap"].parse_args(["--config", str(file)])
    assert bootstrap.peers == ["a"]
    chat = by_command["client", "chat"].parse_args(["--config", str(file), "--peers", "c"])
    assert chat.swarm_key == Path("swarm.key")


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ("[node.status]\nblocks = '0:1'", "[node.status] blocks = '0:1': python -m node status has no flag"),
        ("[node]\ntop-k = 4", "[node] top-k = 4: python -m node has no flag --top-k"),
        ("top-k = 4", "top-k = 4: python -m node has no flag --top-k"),
        (
            "[node.statsu]\npeers = ['a']",
            "[node.statsu] is no command's table; tables here: [node.bootstrap]",
        ),
        ("[nodes]\npeers = ['a']", "[nodes] is no command's table"),
        (
            "[[node.status]]\njson = true",
            "[node] status = [{'json': True}]: [node.status] is a table of flags",
        ),
        ("[status]\njson = true", "tables here: [client], [gateway], [node]; did you mean [node.status]?"),
        ("[node.status.json]\nx = 1", "[node.status.json] is no table: json is a flag, with a value after ="),
        ("[node.node]\nthreads = 1", "[node.node] is no command's table; tables here: [node.bootstrap]"),
    ],
)
def test_a_key_of_no_command_and_a_table_of_no_command_are_errors(tmp_path, toml, expected):
    file = tmp_path / "fleet.toml"
    file.write_text(toml)
    for command in (("node",), ("node", "status")):
        parser = next(each for each in COMMANDS if each.command == command)
        with pytest.raises(ConfigError) as caught:
            parser.parse_args(["--config", str(file), "--peers", "a"])
        assert expected in str(caught.value)


def test_two_headers_of_one_table_have_each_key_once(tmp_path):
    file = tmp_path / "fleet.toml"
    gateway = next(each for each in COMMANDS if each.command == ("client", "gateway"))
    file.write_text("[gateway]\nport = 1\n[client.gateway]\nhost = 'x'\n")
    found = gateway.parse_args(["--config", str(file), "--peers=a"])
    assert (found.port, found.host) == (1, "x")
    file.write_text("[gateway]\nport = 1\n[client.gateway]\nport = 2\n")
    with pytest.raises(ConfigError, match=r"there twice, as \[gateway\] port and as \[client.gateway\] port"):
        gateway.parse_args(["--config", str(file), "--peers=a"])
    file.write_text("[gateway.http]\nport = 1\n")
    with pytest.raises(ConfigError, match=r"\[gateway.http\] is no command's table; tables here: none"):
        gateway.parse_args(["--config", str(file), "--peers=a"])


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["--config", "FILE", "status"], ("node", "status")),
        (["--config=FILE", "--print-config", "status", "--json"], ("node", "status")),
        (["--config", "FILE"], ("node",)),
        (["--config", "FILE", "gateway"], ("client", "gateway")),
        (["--config=FILE", "generate"], ("client", "generate")),
        (["--config", "FILE", "adapters", "list"], ("client", "adapters", "list")),
        (["adapters", "--config=FILE", "list"], ("client", "adapters", "list")),
    ],
)
def test_a_configuration_may_precede_the_command(words, command, tmp_path, capsys):
    file = tmp_path / "raceme.toml"
    file.write_text('swarm-key = "of-the-file"\n')
    main = node.__main__.main if command[0] == "node" else client.__main__.main
    with pytest.raises(SystemExit) as stop:
        main([*(word.replace("FILE", str(file)) for word in words), "--print-config"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"[{'.'.join(command)}]\n" in text
    assert f'swarm-key = "of-the-file"  # {file}: swarm-key\n' in text


def test_a_word_that_no_flag_takes_is_no_part_of_a_configuration_that_is_printed(capsys):
    for parser in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(["--print-config", "--no-such-flag"])
        assert stop.value.code == 2
        assert "unrecognized arguments: --no-such-flag" in capsys.readouterr().err


def test_print_config_is_a_file_of_the_values_in_force_with_their_origins(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RACEME_SHARE", "0.75")
    monkeypatch.setenv("RACEME_SHAER", "1")
    file = tmp_path / "raceme.toml"
    file.write_text('[node]\npeers = ["a", "b\\"c\\u007f"]\nno-ui = true\nmax-disk = "1KiB"')
    with pytest.raises(SystemExit) as stop:
        a_parser().parse_args(["--config", str(file), "--name", "é", "--print-config"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    found = tomllib.loads(text)["node"]
    assert found == {
        "peers": ["a", 'b"c\x7f'], "no-ui": True, "share": 0.75, "name": "é", "max-disk": 1024,
    }  # fmt: skip
    assert "share = 0.75  # RACEME_SHARE\n" in text
    assert f"no-ui = true  # {file}: [node] no-ui\n" in text
    assert 'name = "é"  # command line\n' in text
    assert '# dtype = "float32"  # default\n' in text
    assert "# json = false  # default\n" in text
    assert "# threads =  # default\n" in text
    assert "# RACEME_SHAER is set, which is no flag of this command\n" in text
    again = tmp_path / "again.toml"
    again.write_text(text, encoding="utf-8")
    first = vars(a_parser().parse_args(["--config", str(file), "--name", "é"]))
    second = vars(a_parser().parse_args(["--config", str(again)]))
    assert first | {"config": None} == second | {"config": None}


def test_print_config_hides_secrets(capsys, monkeypatch):
    monkeypatch.setenv("RACEME_API_KEY", "sk-verysecret")
    monkeypatch.setenv("RACEME_PEERS", "https://me:pass@example.org/x")
    with pytest.raises(SystemExit):
        a_parser().parse_args(["--swarm-key", "swarm.key", "--print-config"])
    text = capsys.readouterr().out
    assert "verysecret" not in text
    assert "pass@" not in text
    assert 'swarm-key = "swarm.key"' in text  # a path, and no secret


def test_print_config_needs_none_of_what_the_command_needs(capsys):
    for parser in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(["--print-config"])
        assert stop.value.code == 0
        tomllib.loads(capsys.readouterr().out)


def test_a_range_that_is_checked_later_names_the_file_too(tmp_path, capsys, monkeypatch):
    file = tmp_path / "raceme.toml"
    file.write_text("[node]\nmin-replicas = 0\n")
    assert node.__main__.main(["--config", str(file)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: --min-replicas is 0, 1 to 1000 are allowed ({file}: [node] min-replicas)"
    )
    monkeypatch.setenv("RACEME_BALANCE_QUALITY", "3")
    assert node.__main__.main([]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("0 to 1 is allowed (RACEME_BALANCE_QUALITY)")
    monkeypatch.delenv("RACEME_BALANCE_QUALITY")
    assert node.__main__.main(["--balance-quality", "3"]) == 2
    assert "(" not in capsys.readouterr().err.splitlines()[-1]


def test_an_error_of_a_file_is_one_line_and_code_2(tmp_path, capsys):
    file = tmp_path / "raceme.toml"
    file.write_text("[client]\ntop-kk = 1\n")
    assert client.__main__.main(["generate", "x", "--config", str(file)]) == 2
    assert capsys.readouterr().err == (
        f"error: {file}: [client] top-kk = 1: python -m client has no flag --top-kk, see its --help;"
        " did you mean top-k?\n"
    )


def test_a_file_may_begin_with_a_byte_order_mark_and_end_lines_with_two_characters(tmp_path):
    file = tmp_path / "raceme.toml"
    file.write_bytes(b'\xef\xbb\xbfthreads = 2\r\nname = "x"\r\n')
    found = a_parser().parse_args(["--config", str(file)])
    assert (found.threads, found.name) == (2, "x")


def test_a_path_of_a_file_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "home.toml").write_text("threads = 3")
    monkeypatch.setenv("RACEME_CONFIG", "~/home.toml")
    assert a_parser().parse_args([]).threads == 3
    monkeypatch.setenv("RACEME_CONFIG", "~nobody-of-this-name/home.toml")
    with pytest.raises(ConfigError, match="begins with the home folder of no user"):
        a_parser().parse_args([])
    assert parsed(tmp_path, 'swarm-key = "~/swarm.key"').swarm_key == tmp_path / "swarm.key"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1048576", 1 << 20), ("512B", 512), ("20GiB", 20 << 30), ("20G", 20 << 30), ("20 GB", 20 * 10**9),
        ("1.5k", 1536), ("4mib", 4 << 20), ("2TiB", 2 << 40),
    ],
)  # fmt: skip
def test_sizes_have_units_of_1024_and_of_1000(text, expected):
    assert size(text) == expected


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "GiB", "20XB", "20 GiBs", "1e3", "inf", "9" * 30, "20IB", "0.1"]
)
def test_other_sizes_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a number of bytes"):
        size(text)
