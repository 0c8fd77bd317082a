"""The heart: one pass of a step's microbatches through all layers."""

from __future__ import annotations

import torch
from torch import Tensor

from afd.handoff.frame import FFN
from afd.model.kv_cache import KVCache
from afd.model.stack import AttentionStack
from services.attention.microbatch import Microbatch
from services.attention.timeline import StepTimeline


class Decoder:
    """Attention here, FFN behind the seam. While one microbatch is away, the next one's attention runs."""

    def __init__(self, stack: AttentionStack, cache: KVCache, ffn: FFN) -> None:
        self.stack = stack
        self.cache = cache
        self.ffn = ffn

    def forward(self, microbatches: list[Microbatch], timeline: StepTimeline) -> None:
        """Leaves each microbatch's last hidden states in it. Raises PeerUnavailable if an FFN shard is lost; the
        same step can then be run again: what it wrote to the KV cache is what it will write."""
        for batch in microbatches:
            batch.hidden_states = self.stack.embed(batch.token_ids)
        for layer_idx in range(len(self.stack.layers)):
            for batch in self._awaited(microbatches):
                if layer_idx:
                    self._receive(batch, layer_idx - 1, timeline)
                self._attend_and_send(batch, layer_idx, timeline)
        for batch in self._awaited(microbatches):
            self._receive(batch, len(self.stack.layers) - 1, timeline)

    def logits(self, microbatches: list[Microbatch]) -> Tensor:
        """Logits [sequences sampled, V] float32, one microbatch after the other."""
        last = [batch.hidden_states[batch.sampled_rows] for batch in microbatches]
        return self.stack.logits(torch.cat(last))

    def _attend_and_send(self, batch: Microbatch, layer_idx: int, timeline: StepTimeline) -> None:
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

    def _receive(self, batch: Microbatch, layer_idx: int, timeline: StepTimeline) -> None:
        with timeline.measure("receive", layer_idx, batch.slot):
            batch.hidden_states += self.ffn.receive(batch)  # residual + every shard's partial sum

    def _awaited(self, microbatches: list[Microbatch]) -> list[Microbatch]:
        """Those that somebody still waits for; the frames of the others are dropped."""
        awaited = [batch for batch in microbatches if not batch.abandoned]
        for batch in microbatches:
            if batch not in awaited:
                self.ffn.drop(batch)
        return awaited
