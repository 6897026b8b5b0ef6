"""How long a session may be: the model, the servers and whoever is asked say it, and the smallest counts."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import client
from client.config import ClientConfig
from client.swarm import Swarm
from node.__main__ import main
from node.config import ConfigError
from node.model.blocks.span import load_span
from node.model.checkpoint.info import UNBOUNDED_POSITIONS, ModelInfo, read_info
from node.model.checkpoint.source import resolve
from routing.chains.alternatives import Constraints
from routing.names import ModelId, PeerId, Revision
from routing.view.records import Record
from tensor_codec.errors import Refused
from tensor_codec.journal import Journal
from tensor_codec.limits import MIB, Limits, limits_with
from tests.model_fixtures import save_tiny

INFO = ModelInfo(ModelId("m"), Revision("r"), "llama", 6, 64, 96, 131_072, (1,) * 6, 1, 1)


def swarm(*session_tokens: int, limits: Limits | None = None, info: ModelInfo = INFO) -> Swarm:
    """A client of servers that have all blocks and take sessions so long."""
    spans = tuple(
        Record(peer=PeerId(str(n)), role="serve", stop=6, session_tokens=tokens)
        for n, tokens in enumerate(session_tokens)
    )
    view = SimpleNamespace(spans=lambda revision, blocks: spans)
    nothing = SimpleNamespace(
        last_view=view,
        constraints=Constraints(),
        observe_prefill=None,
        dtype_of=None,
        open_stream=print,
        blame=None,
    )
    config = ClientConfig(peers=("there",), limits=limits or Limits())
    return Swarm(config, info, None, nothing, None, nothing, None, None, None)  # type: ignore[arg-type]


def test_a_length_that_nobody_said_follows_the_model_and_a_server_s_cache():
    assert swarm(65_536).usual_length() == 16_384
    assert swarm(65_536, 524_288).usual_length() == 131_072
    assert swarm(65_536, info=replace(INFO, max_position=8192)).usual_length() == 8192
    assert swarm(8192).usual_length() == 2048, "as a quarter of a small cache is too short to be of use"
    assert swarm(1000).usual_length() == 1000
    assert swarm(65_536).usual_length(batch=4) == 4096
    assert swarm(65_536, limits=Limits(max_session_tokens=5000)).usual_length() == 5000
    assert swarm().usual_length() == 2048, "nobody has said anything yet"


@pytest.mark.parametrize(
    ("there", "length", "found"),
    [
        (swarm(524_288), 131_073, "131073 positions, 1 to 131072 are allowed: m has no more"),
        (swarm(40_000, 30_000), 40_001, "1 to 40000 are allowed: the servers take sessions of 40000 tokens"),
        (swarm(65_536), 0, "max_length is 0, a whole number of at least 1 is needed"),
        (swarm(65_536), -1, "max_length is -1, a whole number of at least 1 is needed"),
        (
            swarm(65_536, limits=Limits(max_session_tokens=32_000)),
            32_001,
            "1 to 32000 are allowed: max_session_tokens is 32000",
        ),
    ],
)
def test_a_length_that_cannot_be_says_who_allows_how_much(there, length, found):
    with pytest.raises(ValueError, match=found):
        there.conversation(length)


def test_lengths_that_can_be_are_taken():
    assert swarm(131_072)._lengths.longest(1) == 131_072
    swarm(131_072)._lengths.check(131_072, "a whole model's length")
    swarm()._lengths.check(131_072, "where no server has said anything")
    swarm(40_000)._lengths.check(10_000, "four rows", batch=4)
    with pytest.raises(ValueError, match="1 to 10000 are allowed"):
        swarm(40_000)._lengths.check(10_001, "four rows", batch=4)


async def test_rows_of_which_one_position_fits_no_frame_are_refused_before_anything_is_opened():
    wide = replace(INFO, hidden_size=16_384)
    with pytest.raises(ValueError, match="one position of 256 rows takes 16777216 bytes, max_frame_bytes is"):
        async with swarm(65_536, info=wide).session(batch=256, max_length=4):
            pass


@pytest.mark.parametrize(
    ("hidden", "codec_bytes", "tokens"), [(576, 4, 2048), (4096, 4, 1023), (8192, 2, 1023), (16_384, 4, 255)]
)
def test_a_step_is_as_long_as_a_frame_has_room_for(hidden, codec_bytes, tokens):
    assert Limits().step_tokens(hidden * codec_bytes) == tokens
    roomy = Limits(max_step_tokens=8192, max_frame_bytes=1024 * MIB)
    assert roomy.step_tokens(hidden * codec_bytes) == 8192


@pytest.mark.parametrize(
    ("chosen", "found"),
    [
        ({"max_session_tokens": 15}, "max_session_tokens is 15, 16 to"),
        ({"max_step_tokens": 2047}, "max_step_tokens is 2047, 2048 to 1048576 are allowed"),
        ({"max_frame_bytes": 1}, "max_frame_bytes is 1, 16777216 to 1073741824 are allowed"),
        ({"session_idle_seconds": float("nan")}, "session_idle_seconds is nan, 5 to 86400 are allowed"),
        ({"session_life_seconds": float("inf")}, "session_life_seconds is inf, 60 to 2592000 are allowed"),
        ({"tape_bytes": -1}, "tape_bytes is -1, 0 to 1099511627776 are allowed"),
        ({"max_session_tokens": True}, "max_session_tokens is True"),
        ({"max_session_tokens": 20.5}, "max_session_tokens is 20.5"),
        ({"max_step_tokens": "4096"}, "max_step_tokens is '4096'"),
    ],
)
def test_a_limit_out_of_range_says_what_is_allowed(chosen, found, capsys):
    with pytest.raises(ValueError, match=found):
        limits_with(**chosen)
    ((name, value),) = chosen.items()
    if type(value) in (int, float) and value != 20.5:  # else no number reaches us from a command line
        assert main([f"--{name.replace('_', '-')}", str(value)]) == 2
        assert f"error: --{name.replace('_', '-')} is {value}" in capsys.readouterr().err
    if name.startswith("max_"):
        with pytest.raises(ConfigError, match=found.partition(",")[0]):
            client.connect(peers=["/ip4/10.0.0.5/tcp/1/p2p/x"], **chosen)


def test_what_was_chosen_is_in_force_and_the_rest_as_it_was():
    chosen = limits_with(max_session_tokens=40_000, max_step_tokens=None)
    assert chosen == Limits(max_session_tokens=40_000)


@pytest.mark.parametrize(
    ("variant", "changes", "positions"),
    [
        ("bloom", {}, UNBOUNDED_POSITIONS),
        ("bloom", {"seq_length": 2048}, UNBOUNDED_POSITIONS),  # that of its training
        ("falcon_alibi", {}, UNBOUNDED_POSITIONS),
        ("falcon", {"max_position_embeddings": 4096}, 4096),
        ("mpt", {"max_seq_len": 512}, 512),
        ("llama", {"max_position_embeddings": 131_072}, 131_072),
    ],
)
def test_a_model_s_positions_are_those_that_its_own_code_computes_with(variant, changes, positions, tmp_path):
    save_tiny(variant, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert read_info(resolve(str(tmp_path / "model"), cache_dir=tmp_path)).max_position == positions


def test_a_journal_for_which_there_is_no_memory_is_a_refusal():
    with pytest.raises(Refused, match="bytes of memory are not to be had here"):
        Journal(1, 2**40, 2**40)
    journal = Journal(1, 4 * 16_384, 131_072)  # 8 GiB that take nothing before they are used
    journal.append(131_071, 1, bytes(4 * 16_384))
    assert journal.tokens == 1


def test_alibi_goes_on_beyond_the_length_of_its_training_as_in_the_library(tmp_path):
    whole = save_tiny("bloom", tmp_path / "model").transformer
    folder = resolve(str(tmp_path / "model"), cache_dir=tmp_path)
    info = read_info(folder)
    span = load_span(folder, 0, info.blocks, dtype=torch.float32, device="cpu", quantize="none")
    cache = span.new_arena(2304, info.max_position).open(1, info.max_position)
    ids = torch.randint(3, 96, (1, 2304), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        hidden = whole.word_embeddings_layernorm(whole.word_embeddings(ids))
        found = torch.cat([span.forward(hidden[:, i : i + 256], cache, i) for i in range(0, 2304, 256)], 1)
        torch.testing.assert_close(whole.ln_f(found), whole(ids).last_hidden_state, atol=1e-4, rtol=1e-4)
