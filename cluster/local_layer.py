"""One MoE layer in this process, without servers or Ray: what `expertmesh layer` runs and answers are checked against.

The same gate, expert and shared-expert code as the router's and the servers', on weights read on demand.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from experts.compute import partial_sums
from experts.packed import WeightDtype
from experts.weights import ExpertCopy, load_expert, progress
from protos.checkpoint import Checkpoint
from protos.errors import InvalidRequest
from protos.model import ModelSpec
from router.around import Around
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
    weight_dtype: WeightDtype | None = None
    checkpoint: Checkpoint | None = None  # of `spec`, if the caller has one: opening a large one takes seconds
    _copies: dict[int, ExpertCopy] = field(default_factory=dict)
    _checkpoint: Checkpoint = field(init=False)
    _gate: Gate = field(init=False)
    _around: Around = field(init=False)
    _shared: SharedExpert | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        block = self.spec.blocks.get(self.layer)
        if block is None:
            raise InvalidRequest(f"layer {self.layer!r} is not a MoE layer of this model {list(self.spec.layers)}")
        self._checkpoint = self.checkpoint or Checkpoint(self.spec)
        self._gate = Gate(block.gate, self._checkpoint.gate(self.layer))
        self._around = Around(block, self._checkpoint.around(self.layer))
        weights = self._checkpoint.shared(self.layer)
        if block.shared is not None and weights is not None:
            self._shared = SharedExpert(block.shared, weights)

    def __call__(
        self, x_TD: Tensor, routing: Routing | None = None, *, token_ids_T: npt.NDArray[np.int64] | None = None
    ) -> tuple[Tensor, Routing]:
        """The whole block's output [T, D] and the routing it used.

        Args:
            x_TD: hidden states.
            routing: experts (-1: none) and weights to use; None for the model's own gate.
            token_ids_T: of the tokens, for layers whose gate looks experts up by them.
        """
        if routing is None:
            routing = self._gate(x_TD, token_ids_T=token_ids_T)
        x_TL = self._around.enter(x_TD)
        served_TK = (routing.expert_TK >= 0) & (routing.expert_TK < self.spec.num_experts)
        token_P, slot_P = np.nonzero(served_TK)
        expert_P = routing.expert_TK[token_P, slot_P]
        missing = sorted(set(expert_P.tolist()) - self._copies.keys())
        for expert in progress(missing, f"layer {self.layer}"):
            self._copies[expert] = self._read(expert)
        if len(expert_P):
            y_TL = partial_sums(
                x_TL, token_P.astype(np.int32), expert_P, routing.weight_TK[token_P, slot_P], self._copies
            )
        else:
            y_TL = np.zeros(x_TL.shape, dtype=np.float32)
        shared_TD = None if self._shared is None else self._shared(x_TD)
        y_TD = self._around.leave(y_TL, x_TD, shared_TD, expert_TK=routing.expert_TK, weight_TK=routing.weight_TK)
        return y_TD, routing

    def _read(self, expert: int) -> ExpertCopy:
        return load_expert(
            self._checkpoint,
            self.layer,
            expert,
            device=torch.device("cpu"),
            dtype=self.dtype,
            weight_dtype=self.weight_dtype,
        )
