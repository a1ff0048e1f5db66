"""The demo's traffic: what the model's tokens choose, and several domains mixed.

Shapes: N tokens, K experts per token, E experts.
"""

from collections.abc import Mapping
from itertools import cycle

import numpy as np
from torch import Tensor

from cluster.demo_timeline import Key
from cluster.traffic import TraceTraffic, Work
from protos.checkpoint import Checkpoint
from protos.model import ModelSpec
from router.gate import Gate


def hottest(states: Mapping[str, Tensor], spec: ModelSpec) -> list[Key]:
    """The experts that a domain's tokens choose most, hottest first, one per layer."""
    checkpoint = Checkpoint(spec)
    counted: list[tuple[int, Key]] = []
    for layer, x_ND in states.items():
        expert_NK = Gate(spec.blocks[layer].gate, checkpoint.gate(layer))(x_ND).expert_TK
        count_E = np.bincount(expert_NK.ravel(), minlength=spec.num_experts)
        counted.append((int(count_E.max()), (layer, int(count_E.argmax()))))
    return [key for _, key in sorted(counted, reverse=True)]


class MixedTraffic:
    """Requests of several domains in turn."""

    def __init__(self, parts: list[TraceTraffic]) -> None:
        self._parts = cycle(parts)

    def next(self) -> Work:
        return next(self._parts).next()
