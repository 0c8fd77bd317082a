"""The heart: one pass of a microbatch through all layers."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from afd.handoff.frame import FFN
from afd.model.kv_cache import KVCache
from afd.model.stack import AttentionStack
from services.attention.microbatch import Microbatch
from services.attention.timeline import Timeline


class Decoder:
    """Attention here, FFN behind the seam."""

    def __init__(self, stack: AttentionStack, cache: KVCache, ffn: FFN) -> None:
        self.stack = stack
        self.cache = cache
        self.ffn = ffn

    def forward(self, batch: Microbatch, timeline: Timeline) -> Iterator[None]:
        """Leaves the last hidden states in the microbatch. Pauses whenever it is away at the FFN, so that another one
        can be attended to meanwhile. Raises PeerUnavailable if an FFN shard is lost; the microbatch can then be run
        again: what it wrote to the KV cache is what it will write."""
        batch.hidden_states = self.stack.embed(batch.token_ids)
        for layer_idx in range(len(self.stack.layers)):
            self._attend_and_send(batch, layer_idx, timeline)
            yield
            self._receive(batch, layer_idx, timeline)

    def logits(self, batch: Microbatch) -> Tensor:
        """Logits [sequences sampled, V] float32."""
        return self.stack.logits(batch.hidden_states[batch.sampled_rows])

    def _attend_and_send(self, batch: Microbatch, layer_idx: int, timeline: Timeline) -> None:
        with timeline.measure("attention", layer_idx, batch.slot):
            batch.hidden_states, ffn_input, routing = self.stack.layers[layer_idx].attend(
                batch.hidden_states,
                self.cache.keys[layer_idx],
                self.cache.values[layer_idx],
                batch.attention,
                out=self.ffn.buffer(batch),
            )
        with timeline.measure("send", layer_idx, batch.slot):
            self.ffn.send(batch, layer_idx, ffn_input, routing)

    def _receive(self, batch: Microbatch, layer_idx: int, timeline: Timeline) -> None:
        with timeline.measure("receive", layer_idx, batch.slot):
            batch.hidden_states += self.ffn.receive(batch)  # residual + every shard's partial sum
