"""Adapters that operators keep for everybody: real nodes announce them, clients use them by their names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import client
from benchmarks.lib.processes import local_swarm
from client.adapters.adapter import Adapter
from client.hf import from_swarm
from node.model.checkpoint.source import resolve
from node.model.embed_and_head import load_embed_and_head
from tests.forked import Forked, forked_run

pytestmark = pytest.mark.process

FLAGS = ["--threads", "1", "--dtype", "float32", "--device", "cpu", "--cache-tokens", "1024"]
PROMPT = [5, 6, 7, 8, 9]


def adapter_in(path: Path, model: Path) -> Adapter:
    """A folder with an adapter that changes tokens."""
    ends = load_embed_and_head(resolve(str(model), cache_dir=path.parent))
    adapter = client.new_adapter({"r": 4, "target_modules": ["q_proj", "up_proj"]}, ends, dtype="fp32")
    torch.manual_seed(1)
    with torch.no_grad():
        for each in adapter.parameters():
            each.add_(torch.randn_like(each) * 0.3)
    client.save_adapter(adapter, path)
    return adapter


async def tokens(handle: Any, adapter: Any) -> list[int]:
    stream = handle.generate(PROMPT, max_new_tokens=8, adapter=adapter, stop_token_ids=[], do_sample=False)
    return [token.id async for token in stream]


async def test_an_adapter_that_servers_keep_is_used_by_its_name(tiny_llama: Path, tmp_path: Path) -> None:
    own = adapter_in(tmp_path / "poems", tiny_llama)
    announced = f"poems#{own.id[:16]}"
    with local_swarm([str(tiny_llama), *FLAGS], spawn=Forked) as swarm:
        swarm.start("--blocks", "0:3", "--adapter", str(tmp_path / "poems")).wait_online()
        for flags in (("--adapter", str(tmp_path / "poems")), ()):
            swarm.start("--blocks", "3:6", *flags)
        for node in swarm.nodes:
            node.wait_online()
        keepers = {node.facts["peer_id"] for node in swarm.nodes[:2]}
        assert f"adapter {announced} for everybody" in swarm.nodes[0].tail(100)
        async with client.connect(str(tiny_llama), peers=swarm.peers, wait_seconds=5) as handle:
            seen = {record.peer for record in handle.view().records() if announced in record.adapters}
            assert seen == keepers
            plain, mine = await tokens(handle, None), await tokens(handle, own)
            assert plain != mine
            for name in ("poems", announced):
                assert await tokens(handle, name) == mine
            hidden = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
            async with handle.session(batch=2, max_length=8, adapter="poems") as session:
                step = await session.step(hidden)
                assert {hop.peer for hop in session.chain.hops} == keepers
            expected = await handle.forward(hidden, adapter=own)
            torch.testing.assert_close(await handle.forward(hidden, adapter="poems"), expected)
            torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-5)
            _, kept = await handle.forward_kept(hidden, adapter="poems")
            found = await handle.gradients(kept, torch.ones_like(hidden))
            assert found.adapter is None  # it is not the client's
            of_mine = await handle.backward(hidden, torch.ones_like(hidden), adapter=own)
            torch.testing.assert_close(found.hidden, of_mine, rtol=1e-4, atol=1e-5)
            with pytest.raises(client.NoChain, match="none of these keeps an adapter 'prose'"):
                await handle.forward(hidden, adapter="prose")
        with client.connect_sync(str(tiny_llama), peers=swarm.peers) as blocking:
            text = from_swarm(blocking, active_adapter="poems").generate(
                torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None
            )
            assert text[0, len(PROMPT) :].tolist() == mine
        words = ["--peers", *swarm.peers, "--model", tiny_llama, "--json", "--greedy", "--max-new-tokens", 8]
        answers = []
        for named in ("poems", tmp_path / "poems"):
            done = forked_run("client", "generate", *words, "--adapter", named, "hello")
            assert done.returncode == 0, done.stderr
            answers.append(json.loads(done.stdout)["tokens"])
        assert answers[0] == answers[1]
        assert [node.stop() for node in swarm.nodes] == [0, 0, 0]


def test_a_bad_adapter_is_one_clear_line_at_the_start(tiny_llama: Path, tmp_path: Path) -> None:
    adapter_in(tmp_path / "poems", tiny_llama)
    config = tmp_path / "poems" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": True}))
    done = forked_run("node", tiny_llama, *FLAGS, "--adapter", tmp_path / "poems")
    assert done.returncode == 2
    assert "use_dora is True: the magnitudes of DoRA are not computed" in done.stderr
    assert "Traceback" not in done.stderr
