"""Many streams at once through a real gateway, behind it a stub of an attention replica."""

from __future__ import annotations

from benchmarks.gateway import Load, measure


def test_hundreds_of_streams_get_every_token_through_the_gateway() -> None:
    through_gateway, direct = measure([Load("", streams=300, interval_s=0.5, tokens=4)], cores=(None, None))
    assert (through_gateway.way, through_gateway.num_errors) == ("gateway", 0)
    assert through_gateway.num_tokens == direct.num_tokens == 300 * 4
