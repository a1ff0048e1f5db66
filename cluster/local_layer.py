"""One MoE layer in this process, without servers or Ray: what `expertmesh layer` runs and answers are checked against.

The same gate, expert and shared-expert code as the router's and the servers', on weights read on demand.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from experts.compute import partial_sums
from experts.weights import ExpertCopy
from protos.checkpoint import Checkpoint
from protos.errors import InvalidRequest
from protos.model import ModelSpec
from router.combine import finish
from router.gate import Gate, Routing
from router.shared import SharedExpert


@dataclass(slots=True, eq=False)
class LocalLayer:
    """Layer `layer` of a model, computed here in `dtype`.

    Raises:
        InvalidRequest: the model has no such MoE layer.
        CorruptWeights: its tensors cannot be read.
    """

    spec: ModelSpec
    layer: str
    dtype: torch.dtype = torch.float32
    _copies: dict[int, ExpertCopy] = field(default_factory=dict)
    _checkpoint: Checkpoint = field(init=False)
    _gate: Gate = field(init=False)
    _shared: SharedExpert | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.layer not in self.spec.layers:
            raise InvalidRequest(f"layer {self.layer!r} is not a MoE layer of this model {list(self.spec.layers)}")
        self._checkpoint = Checkpoint(self.spec)
        self._gate = Gate(self.spec.gate, self._checkpoint.gate(self.layer))
        if self.spec.shared is not None:
            weights = self._checkpoint.shared(self.layer)
            assert weights is not None, "the spec says that every layer has a shared expert"
            self._shared = SharedExpert(self.spec.shared, weights)

    def __call__(self, x_TD: Tensor, routing: Routing | None = None) -> tuple[Tensor, Routing]:
        """The whole block's output [T, D] and the routing it used.

        Args:
            x_TD: hidden states.
            routing: experts (-1: none) and weights to use; None for the model's own gate.
        """
        if routing is None:
            routing = self._gate(x_TD)
        token_P, slot_P = np.nonzero(routing.expert_TK >= 0)
        expert_P = routing.expert_TK[token_P, slot_P]
        for expert in set(expert_P.tolist()) - self._copies.keys():
            self._copies[expert] = self._read(expert)
        if len(expert_P):
            y_TD = partial_sums(
                x_TD, token_P.astype(np.int32), expert_P, routing.weight_TK[token_P, slot_P], self._copies
            )
        else:
            y_TD = np.zeros(x_TD.shape, dtype=np.float32)
        shared_TD = None if self._shared is None else self._shared(x_TD)
        return finish(y_TD, shared_TD, dtype=x_TD.dtype), routing

    def _read(self, expert: int) -> ExpertCopy:
        weights = self._checkpoint.expert(self.layer, expert)
        return ExpertCopy(
            w13_2FD=torch.cat((weights.gate_FD, weights.up_FD)).to(self.dtype), w2_DF=weights.down_DF.to(self.dtype)
        )
