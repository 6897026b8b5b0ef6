"""What a server serves, and whether it can compute what a client asks for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from node.serving.span_admission import SpanAdmission
from tensor_codec.blocks import Blocks
from tensor_codec.errors import Draining, WrongRevision
from tensor_codec.span_spec import SpanSpec

SERVED = SpanSpec("llama", "r1", Blocks(2, 8), "float32", quantize="int8", hidden=64, max_position=2048)
ASKED = SpanSpec("llama", "r1", Blocks(2, 8), "float32")


@pytest.mark.parametrize(
    "asked",
    [
        ASKED,
        replace(ASKED, blocks=Blocks(3, 4)),
        replace(ASKED, model="another name of it"),  # the revision says which model it is
    ],
)
def test_a_part_of_the_span_is_admitted(asked):
    SERVED.admits(asked)
    SpanAdmission(SERVED).admits(asked)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"revision": "r2", "model": "mistral"},
            "revision r2 of mistral was asked for, r1 of llama is served here",
        ),
        ({"dtype": "bfloat16"}, "dtype bfloat16 was asked for, float32 is served here"),
        ({"blocks": Blocks(1, 8)}, "blocks 1:8 were asked for, 2:8 are served here"),
        ({"blocks": Blocks(2, 9)}, "blocks 2:9 were asked for, 2:8 are served here"),
        ({"blocks": Blocks(5, 5)}, "blocks 5:5 were asked for, 2:8 are served here"),
        ({"adapter": "poems"}, "adapter poems was asked for, none is served here"),
    ],
)
def test_what_is_not_served_is_refused_with_what_was_found_and_what_is_allowed(changes, message):
    for check in (SERVED.admits, SpanAdmission(SERVED).admits):
        with pytest.raises(WrongRevision) as refusal:
            check(replace(ASKED, **changes))
        assert str(refusal.value) == message


def test_an_adapter_is_admitted_where_it_is_served_and_so_is_none():
    served = replace(SERVED, adapter="poems")
    served.admits(replace(ASKED, adapter="poems"))
    served.admits(ASKED)
    with pytest.raises(WrongRevision, match="adapter prose was asked for, poems is served here"):
        served.admits(replace(ASKED, adapter="prose"))


def test_a_node_that_is_about_to_leave_says_so_whatever_is_asked_for():
    admission = SpanAdmission(SERVED)
    admission.drain()
    for asked in (ASKED, replace(ASKED, revision="r2")):
        with pytest.raises(Draining):
            admission.admits(asked)
