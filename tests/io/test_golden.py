"""This version and each release understand each other, by the recorded bytes of the releases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from node.config import VERSION
from routing.view.records import RecordError, verify_record
from tensor_codec.errors import MessageError
from tensor_codec.frame import FrameDecoder
from tensor_codec.limits import Limits
from tests import golden
from tests.golden import DATA, changed, joined, messages, without_times

FILES = sorted(DATA.glob("golden-*.json"))
LIMITS = Limits()


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def release(request) -> Any:
    path: Path = request.param
    return json.loads(path.read_text())


def test_the_present_version_has_its_bytes_recorded():
    assert [json.loads(path.read_text())["version"] for path in FILES if VERSION in path.name] == [VERSION]
    (DATA / f"golden-{VERSION}.json").read_text()
    assert golden.main() == 1, "and nothing writes them anew"


def test_every_message_of_a_release_is_read_and_sent_again_byte_by_byte(release):
    known = messages()
    for name, recorded in release["messages"].items():
        frame = bytes.fromhex(recorded)
        assert joined(known[name].again(frame)) == frame, name
        if release["version"] == VERSION:
            assert joined(known[name].parts) == frame, name
    assert known.keys() >= release["messages"].keys()


def test_header_keys_of_a_later_version_are_ignored(release):
    known = messages()
    for name, recorded in release["messages"].items():
        frame = bytes.fromhex(recorded)
        later = changed(frame, novel=[1, {"a": 2}], zz="x")
        assert later != frame
        assert joined(known[name].again(later)) == frame, name


def test_messages_of_a_later_version_are_refused(release):
    known = messages()
    for name, recorded in release["messages"].items():
        with pytest.raises(MessageError):
            known[name].again(changed(bytes.fromhex(recorded), k="novel"))


def test_a_frame_of_a_release_is_its_message(release):
    frame = bytes.fromhex(release["frame"])
    for cut in range(len(frame)):
        decoder = FrameDecoder(LIMITS.max_frame_bytes)
        found = [bytes(each) for piece in (frame[:cut], frame[cut:]) for each in decoder.feed(piece)]
        assert found == [bytes.fromhex(release["messages"]["where"])]


def test_a_record_of_a_release_is_believed_and_says_the_same(release):
    wire = bytes.fromhex(release["record"])
    record, now = golden.record()
    assert verify_record(wire, swarm="public", limits=LIMITS) == record
    if release["version"] == VERSION:
        assert now == wire
    with pytest.raises(RecordError):
        verify_record(wire, swarm="another", limits=LIMITS)


async def test_a_client_of_a_release_gets_the_answers_that_its_own_hops_gave(release, autojump_clock):
    asked = [bytes.fromhex(frame) for frame in release["asked"]]
    assert [frame.hex() for frame in await golden.answers(asked)] == release["answers"]
    if release["version"] == VERSION:
        assert golden.asked() == asked


def test_measured_times_are_the_only_part_of_an_answer_that_is_not_compared(release):
    result = bytes.fromhex(release["messages"]["result"])
    assert joined(messages()["result"].again(without_times(result))) == without_times(result) != result
