"""How many attention instances an FFN instance can serve: the closed form of arXiv 2601.21351."""

from __future__ import annotations

import math

from afd.planner.deployment import Disaggregated
from afd.planner.stages import Workload

_FURTHER = 4


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
    sqrt(b_F / (a_F B)), from where on the FFN's fixed part is shared by enough. Infinite where the FFN takes as long
    for any number of tokens."""
    a_f = ffn_per_token * batch
    if a_f == 0:
        return math.inf
    balanced = (attention_per_token * batch * live_context + attention_fixed - ffn_fixed) / a_f
    return max(balanced, math.sqrt(ffn_fixed / a_f))


def ratio_at(deployment: Disaggregated, workload: Workload, batch: int) -> float:
    """For all FFN instances of a deployment together, with stage times as lines through those at `batch` and at
    `_FURTHER` times as many: a roofline bends, a closed form does not."""
    here, there = (deployment.stages(workload, size) for size in (batch, _FURTHER * batch))
    attention, ffn = (float(here.attention), float(there.attention)), (float(here.ffn), float(there.ffn))
    per_instance = batch * deployment.num_groups / deployment.num_attention
    slopes = [(far - near) / (_FURTHER - 1) for near, far in (attention, ffn)]  # per `batch`
    return attention_per_ffn(
        slopes[0] / per_instance / workload.context,
        max(0.0, attention[0] - slopes[0]),
        slopes[1] / (per_instance * deployment.num_attention),
        max(0.0, ffn[0] - slopes[1]),
        per_instance,
        workload.context,
    )
