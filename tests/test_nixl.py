"""What only the nixl transport has: offers to be checked, notes, agents, memory that is retired."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from afd.errors import ConfigError, InvalidRequest, PeerUnavailable, TransportUnavailable
from afd.handoff.control import ControlStream
from afd.handoff.frame import FrameRules, Timing
from afd.handoff.negotiate import connect_pair
from afd.handoff.nixl import NixlEndpoint, NixlTransport
from afd.handoff.nixl_link import MOST_BYTES_BESIDE_A_NOTE, NixlLink, Note
from afd.handoff.slots import FrameSlots, Region
from afd.v1 import ffn_pb2 as pb
from tests.conftest import Model, needs_nixl
from tests.test_handoff import MAX_FRAME_TOKENS, NUM_SLOTS, SPIN_S, Shard, running_shard, until_no_pair_is_left

NUM_BYTES = 4 * MOST_BYTES_BESIDE_A_NOTE  # of two slots: half of what fits goes beside a note


@pytest.fixture
def model(make_model: Callable[[int], Model]) -> Model:
    return make_model(4)


@pytest.fixture
def no_nixl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afd.handoff.nixl_link._MODULES", ("nixl_of_nowhere",))


def region(num_bytes: int = NUM_BYTES) -> Region:
    return Region.private(num_bytes)


class Side:
    """A link of two slots, and its memory."""

    def __init__(self) -> None:
        self.outgoing, self.incoming = region(), region()
        self.link = NixlLink("tested side", "the other side", self.outgoing, self.incoming, num_slots=2)


async def test_attention_without_nixl_is_told_how_to_install_it(model: Model, no_nixl: None) -> None:
    async with running_shard(model) as shard:
        slots = FrameSlots(region(1 << 20), shard.shape())
        with pytest.raises(ConfigError, match=r"AFD_HANDOFF=nixl .* the attention replica has no NIXL .* pip install"):
            await asyncio.to_thread(connect_pair, shard.address, shard.hello(), slots, "nixl", SPIN_S)
        transport, _ = await asyncio.to_thread(connect_pair, shard.address, shard.hello(), slots, "auto", SPIN_S)
        assert transport.name == "inline"
        transport.close()


async def test_ffn_without_nixl_says_so(model: Model, no_nixl: None) -> None:
    async with running_shard(model) as shard:
        hello = shard.hello()
        hello.nixl.SetInParent()
        with pytest.raises(TransportUnavailable, match=r"the FFN has no NIXL .*: pip install"):
            await asyncio.to_thread(ControlStream, shard.address, hello)


BAD_OFFERS = [
    (lambda offer: setattr(offer, "version", "0.1"), "NIXL differs: the .* has .*, the .* has 0.1"),
    (lambda offer: offer.Clear(), "NIXL differs: the .* has .*, the .* has none"),
    (lambda offer: setattr(offer, "num_bytes", offer.num_bytes + 4096), r"memory has \d+ bytes, not \d+"),
    (lambda offer: setattr(offer, "num_bytes", 0), "memory has 0 bytes, not"),
    (lambda offer: setattr(offer, "address", 4096), "none that NIXL can write to"),
    (lambda offer: setattr(offer, "address", (1 << 64) - 4096), "none that NIXL can write to"),
    (lambda offer: setattr(offer, "address", offer.address + 4096), "none that NIXL can write to"),
    (lambda offer: setattr(offer, "metadata", b""), "none that NIXL can write to"),
    (lambda offer: setattr(offer, "metadata", b"nonsense"), "none that NIXL can write to"),
    (lambda offer: setattr(offer, "metadata", offer.metadata[:-40]), "none that NIXL can write to"),
]
bad_offers = pytest.mark.parametrize(("damage", "words"), BAD_OFFERS)


@needs_nixl
@bad_offers
async def test_bad_offer_of_attention_is_declined_in_words(
    model: Model, damage: Callable[[pb.NixlOffer], Any], words: str
) -> None:
    async with running_shard(model) as shard:
        shape = shard.shape()
        frames, answers = region(NUM_SLOTS * shape.frame_stride), region(NUM_SLOTS * shape.answer_stride)
        attention = NixlLink("attention replica", "the FFN", frames, answers, NUM_SLOTS)
        hello = shard.hello()
        hello.nixl.CopyFrom(attention.offer)
        damage(hello.nixl)
        with pytest.raises(TransportUnavailable, match=words):
            await asyncio.to_thread(ControlStream, shard.address, hello)


@needs_nixl
@bad_offers
def test_bad_offer_of_the_ffn_is_not_accepted(damage: Callable[[pb.NixlOffer], Any], words: str) -> None:
    ours, theirs = Side().link, Side().link
    damage(theirs.offer)
    with pytest.raises(TransportUnavailable, match=words):
        ours.connect(theirs.offer)


Sides = tuple[Side, Side]


@pytest.fixture
def sides() -> Sides:
    one, other = Side(), Side()
    one.link.connect(other.link.offer)
    other.link.connect(one.link.offer)
    return one, other


def notes(reading: Side, writing: Side) -> Iterator[Note]:
    """What arrives while both look."""
    for _ in range(100_000):
        yield from reading.link.poll()
        writing.link.poll()


@needs_nixl
def test_note_comes_when_what_was_written_is_in_place(sides: Sides) -> None:
    one, other = sides
    sizes = 64, 5000, MOST_BYTES_BESIDE_A_NOTE, MOST_BYTES_BESIDE_A_NOTE + 1, NUM_BYTES // 2
    for number, num_bytes in enumerate(4 * sizes, start=1):
        one.outgoing.bytes.fill_(number)
        one.link.write(number % 2, num_bytes, number)
        frame_id, slot, there = next(notes(other, one))
        assert (frame_id, slot) == (number, number % 2)
        assert there is (other.link.beside if num_bytes <= MOST_BYTES_BESIDE_A_NOTE else other.incoming)
        start = slot * NUM_BYTES // 2
        assert there.bytes[start : start + num_bytes].unique().tolist() == [number]


@needs_nixl
def test_slot_that_is_written_again_at_once_ends_with_what_came_last(sides: Sides) -> None:
    one, other = sides
    for number in range(1, 20):
        one.outgoing.bytes.fill_(number)
        one.link.write(0, 4096 if number % 3 else NUM_BYTES // 2, number)
    last = next(note for note in notes(other, one) if note.frame_id == 19)
    assert last.slot == 0
    assert last.region.bytes[:4096].unique().tolist() == [19]


@needs_nixl
def test_what_comes_beside_a_note_does_not_overwrite_the_slots_next_frame(sides: Sides) -> None:
    one, other = sides
    for number in range(1, 40, 2):
        one.outgoing.bytes.fill_(number)
        one.link.write(0, 64, number)
        one.outgoing.bytes.fill_(number + 1)
        one.link.write(0, NUM_BYTES // 2, number + 1)
        large = next(note for note in notes(other, one) if note.frame_id == number + 1)
        assert large.region.bytes[: NUM_BYTES // 2].unique().tolist() == [number + 1]


@needs_nixl
def test_more_than_a_slot_holds_ends_the_pair(sides: Sides) -> None:
    one, other = sides
    one.link._agent.send_notif(one.link._peer_agent, bytes(12 + NUM_BYTES // 2 + 1))
    with pytest.raises(PeerUnavailable, match="the other side sends by NIXL more than a slot holds"):
        next(notes(other, one))
    assert other.incoming.bytes.count_nonzero() == 0


@needs_nixl
@pytest.mark.parametrize("note", [b"", b"short", b"\0" * 8 + b"\2\0\0\0"])
def test_note_that_is_none_ends_the_pair(sides: Sides, note: bytes) -> None:
    one, other = sides
    one.link.write(0, 64, 1)
    assert next(notes(other, one)).frame_id == 1
    one.link._agent.send_notif(one.link._peer_agent, note)
    with pytest.raises(PeerUnavailable, match="the other side tells by NIXL of a slot that does not exist"):
        next(notes(other, one))


async def endpoint_and_link(shard: Shard) -> tuple[NixlEndpoint, NixlLink, FrameSlots]:
    """The FFN side without its batcher, and an attention side without its stream."""
    shape = shard.shape()
    frames, answers = region(NUM_SLOTS * shape.frame_stride), region(NUM_SLOTS * shape.answer_stride)
    attention = NixlLink("attention replica", "the FFN", frames, answers, NUM_SLOTS)
    rules = FrameRules(shard.checkpoint.config, torch.float32, MAX_FRAME_TOKENS)
    endpoint = NixlEndpoint(pb.Hello(nixl=attention.offer), lambda response: None, lambda: None, rules, shape)
    attention.connect(endpoint.offer)
    return endpoint, attention, FrameSlots(frames, shape)


@needs_nixl
async def test_frames_that_were_dropped_or_overtaken_are_not_awaited(model: Model) -> None:
    async with running_shard(model) as shard:
        endpoint, attention, slots = await endpoint_and_link(shard)

        def cross(frame_id: int) -> Any:
            slots.write(shard.frame(frame_id))
            attention.write(0, slots.shape.frame_bytes(3), frame_id)
            while not (frames := endpoint.poll()):
                attention.poll()
            return frames[0]

        first, second = cross(1), cross(2)
        assert (endpoint.awaits(first), endpoint.awaits(second)) == (False, True)
        endpoint.drop(2)
        assert not endpoint.awaits(second)
        third = cross(3)
        endpoint.drop(2)
        assert endpoint.awaits(third)
        assert torch.equal(third.ffn_input, shard.frame(3).ffn_input)


@needs_nixl
async def test_late_answer_to_a_dropped_frame_is_not_taken_for_the_awaited_one(model: Model) -> None:
    async with running_shard(model) as shard:
        pair, dropped, awaited = await shard.connect("nixl"), shard.frame(6), shard.frame(7)
        await pair.send(dropped)
        with pytest.raises(PeerUnavailable, match="in time"):
            await pair.receive(awaited, 0.2)
        await pair.send(awaited)
        assert torch.equal((await pair.receive(awaited)).ffn_output, shard.expected(awaited))
        pair.close()


@needs_nixl
async def test_pair_that_ends_frees_its_agents_but_keeps_the_addresses(model: Model) -> None:
    async with running_shard(model) as shard:
        pair = await shard.connect("nixl")
        assert isinstance(pair.transport, NixlTransport)
        (endpoint,) = shard.servicer.batcher.endpoints or (None,)
        assert isinstance(endpoint, NixlEndpoint)
        links = [weakref.ref(side._link) for side in (pair.transport, endpoint)]
        retired = [weakref.ref(side._link._incoming) for side in (pair.transport, endpoint)]
        frames = endpoint._link._incoming
        frames.bytes.fill_(7)
        del endpoint
        pair.close()
        await until_no_pair_is_left(shard)
        del pair
        async with asyncio.timeout(5):
            while any(link() for link in links):
                gc.collect()
                await asyncio.sleep(0.01)
        assert None not in [region() for region in retired]
        assert frames.bytes.count_nonzero() == 0


@needs_nixl
async def test_ffn_hangs_up_when_nixl_loses_the_peer(model: Model) -> None:
    async with running_shard(model) as shard:
        ended = []
        endpoint, attention, slots = await endpoint_and_link(shard)
        endpoint.hang_up = lambda: ended.append(True)
        frame = shard.frame()
        slots.write(frame)
        attention.write(0, slots.shape.frame_bytes(frame.num_tokens), frame.frame_id)
        while not endpoint.poll():
            attention.poll()
        del attention
        gc.collect()
        async with asyncio.timeout(10):
            while not ended:
                endpoint.reply(frame, endpoint.buffer(frame), Timing(0, 0, 0))
                await asyncio.sleep(0.01)
        assert endpoint.poll() == []
        endpoint.refuse(frame.frame_id, InvalidRequest("too late"))
