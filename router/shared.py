"""The shared expert every token passes through; the router computes it while the routed rows are away.

Shapes: T tokens, D model dim, F hidden dim of the shared expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from protos.activations import activate
from protos.checkpoint import SharedWeights
from protos.model import SharedSpec


class SharedExpert:
    """The shared expert of one layer, times sigmoid(x w_gate^T) where the spec says gated.

    Args:
        spec: its form.
        weights: its matrices, in the model dtype, and the output gate if gated.
    """

    def __init__(self, spec: SharedSpec, weights: SharedWeights) -> None:
        assert (weights.output_gate_1D is not None) == spec.gated, (
            "the checkpoint reader delivers what the spec asks for"
        )
        self.spec = spec
        self._weights = weights

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Returns y_TD in the model dtype; `x_TD` in another dtype is cast to it first."""
        mlp, output_gate_1D = self._weights.mlp, self._weights.output_gate_1D
        x_TD = x_TD.to(mlp.up_IL.dtype)
        y_TD = F.linear(activate(F.linear(x_TD, mlp.up_IL), self.spec.form), mlp.down_LF)
        return y_TD if output_gate_1D is None else torch.sigmoid(F.linear(x_TD, output_gate_1D)) * y_TD
