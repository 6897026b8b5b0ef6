"""A span whose ranks are gone: whoever asks is answered as by a node that leaves, and nothing hangs."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from torch import Tensor

from node.model.parallel.lost import SpanLost
from node.serving.executor.out_of_memory import or_refused
from node.serving.forward_backward import ForwardBackwardListener
from node.serving.span_admission import SpanAdmission
from routing.names import PeerId
from tensor_codec.blocks import Blocks
from tensor_codec.errors import Draining
from tensor_codec.limits import Limits
from tensor_codec.messages.contract import Contract
from tensor_codec.messages.fields import Failed
from tensor_codec.messages.forward_backward import COMPUTE_PROTOCOL, Backward, Forward, decode_output
from tensor_codec.span_spec import SpanSpec
from tests.fakes_forward_backward import whole_numbers
from tests.fakes_serving import HIDDEN, continued, conversation_of, generated, stream_pair, swarm
from tests.io.test_out_of_memory import One, request, running, together

LOST = SpanLost("tensor parallelism over 2 devices has ended: rank 1 was ended by SIGKILL")


async def test_steps_and_prompts_are_answered_and_so_is_what_comes_later(autojump_clock):
    async with running() as (engine, span):
        ones = [One(engine, f"peer {index}", index, batch=1 + index % 2) for index in range(5)]
        await together(ones)
        before = engine.rates.decode_seconds_per_block, engine.rates.alone
        span.error, span.full = LOST, lambda hidden: True
        await together(ones)
        assert [one.cache.length for one in ones] == [1] * 5
        await together(ones[:2], tokens=300)
        for one in ones:
            assert {type(each) for each in one.refusals} == {Draining}
        assert "lost a device" in str(ones[0].refusals[0])
        assert (engine.rates.decode_seconds_per_block, engine.rates.alone) == before
        await engine.measure_again()
        assert (engine.rates.decode_seconds_per_block, engine.rates.alone) == before


@pytest.mark.parametrize("kind", [Forward, Backward])
async def test_a_request_without_a_session_is_answered(kind, autojump_clock):
    async with running() as (engine, span):
        spec = SpanSpec("m", "r", Blocks(0, 4), "float32", hidden=HIDDEN, max_position=4096)
        listener = ForwardBackwardListener(SpanAdmission(spec), engine)
        ours, theirs = stream_pair(PeerId("trainer"), PeerId("a"), COMPUTE_PROTOCOL, Limits())
        hidden, contract = whole_numbers(1, 20, HIDDEN), Contract(b"", 0, 4, 1, 20, HIDDEN, "fp32", 2048)
        span.error, span.full = LOST, lambda hidden: True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener.serve, theirs)
            for _ in range(2):
                await ours.send(request(kind, hidden))
                answer = decode_output(await ours.receive(), contract)
                assert isinstance(answer, Failed)
                assert answer.code == "draining"
            nursery.cancel_scope.cancel()


async def test_a_generation_goes_on_at_another_server(autojump_clock):
    async with swarm() as world:
        world.add_chain(0, 2, 4)
        world.add("spare", 2, 4)
        node = world.nodes[PeerId("hop1")]
        real, count = node.span.decode, 0

        def decode(*args: Any, **how: Any) -> Tensor:
            nonlocal count
            count += 1
            if count >= 3:
                raise LOST
            return real(*args, **how)

        node.span.decode = decode
        conversation = conversation_of(world)
        assert await continued(conversation, [1, 2, 3], 16) == generated([1, 2, 3], 16, 4)
        assert count >= 3
        assert not node.faults
        conversation.close()


def test_a_function_that_finds_the_span_lost_is_refused_as_everything_is():
    def failing() -> None:
        raise LOST

    with pytest.raises(Draining, match="lost a device"):
        or_refused(failing, "a backward", 5.0)()
