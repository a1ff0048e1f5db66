"""The shared expert every token passes through; the router computes it while the routed rows are away.

Shapes: T tokens, D model dim, F hidden dim of the shared expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from protos.checkpoint import SharedWeights
from protos.model import SharedSpec


class SharedExpert:
    """The shared expert of one layer: SwiGLU (arXiv:2002.05202), times sigmoid(x w_gate^T) where the spec says gated.

    Args:
        spec: its form.
        weights: its matrices, in the model dtype, and the output gate if gated.
    """

    def __init__(self, spec: SharedSpec, weights: SharedWeights) -> None:
        assert (weights.output_gate_1D is not None) == spec.gated, (
            "the checkpoint reader delivers what the spec asks for"
        )
        self._weights = weights

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Returns y_TD in the model dtype; `x_TD` in another dtype is cast to it first."""
        weights = self._weights
        x_TD = x_TD.to(weights.gate_FD.dtype)
        # Two projections, not one over [gate; up]: the weights stay the checkpoint's tensors, without a second copy.
        hidden_TF = F.silu(F.linear(x_TD, weights.gate_FD)).mul_(F.linear(x_TD, weights.up_FD))
        y_TD = F.linear(hidden_TF, weights.down_DF)
        if weights.output_gate_1D is None:
            return y_TD
        return torch.sigmoid(F.linear(x_TD, weights.output_gate_1D)) * y_TD
