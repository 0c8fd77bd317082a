"""Several streams as one."""

from __future__ import annotations

import gc
import weakref
from collections.abc import AsyncGenerator

import pytest

from afd.errors import PeerUnavailable
from services.gateway.merge import merged


async def test_what_a_stream_raises_keeps_none_of_them_alive() -> None:
    async def failing() -> AsyncGenerator[int, None]:
        yield 1
        raise PeerUnavailable("gone")

    gc.collect()
    gc.disable()  # nothing waits for it
    try:
        with pytest.raises(PeerUnavailable) as raised:
            assert [item async for item in merged([failing(), failing()])] == [1, 1]
        error = weakref.ref(raised.value)
        del raised
        assert error() is None
    finally:
        gc.enable()
