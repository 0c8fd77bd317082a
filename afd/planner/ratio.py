"""How many attention instances an FFN instance can serve: the closed form of arXiv 2601.21351."""

from __future__ import annotations

import math
from dataclasses import replace

from afd.planner.deployment import Disaggregated
from afd.planner.stages import Workload


def attention_per_ffn(
    attention_per_token: float,
    attention_fixed: float,
    ffn_per_token: float,
    ffn_fixed: float,
    batch: float,
    live_context: float,
) -> float:
    """r that makes tokens per second and card the most, where attention takes a_A B theta + b_A for its batch of B and
    the FFN a_F r B + b_F for those of r attention instances: the larger of where both take equally long, and
    sqrt(b_F / (a_F B)), from where on the FFN's fixed part is shared by enough."""
    a_f = ffn_per_token * batch
    balanced = (attention_per_token * batch * live_context + attention_fixed - ffn_fixed) / a_f
    return max(balanced, math.sqrt(ffn_fixed / a_f))


def ratio_at(deployment: Disaggregated, workload: Workload, batch: int) -> float:
    """For all FFN instances of a deployment together, with stage times as lines through those at `batch` and at twice
    as many."""
    one = replace(deployment, num_attention=1)
    here, there = (deployment.stages(workload, size) for size in (batch, 2 * batch))
    per_instance = batch * one.num_groups
    a_attention = float(there.attention - here.attention) / per_instance / workload.context
    a_ffn = float(there.ffn - here.ffn) / (per_instance * deployment.num_attention)
    return attention_per_ffn(
        a_attention,
        max(0.0, float(2 * here.attention - there.attention)),
        a_ffn,
        max(0.0, float(2 * here.ffn - there.ffn)),
        per_instance,
        workload.context,
    )
