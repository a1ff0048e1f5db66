"""What one expert computes, on plain or packed weights.

Shapes: n rows, D width of the rows, F expert hidden dim.
"""

from torch import Tensor

from experts.packed import linear
from experts.weights import ExpertCopy
from protos.activations import activate


def run_expert(x_nD: Tensor, copy: ExpertCopy) -> Tensor:
    """y_nD of one expert, in the dtype of `x_nD`."""
    hidden_nF = activate(linear(x_nD, copy.up, copy.up_bias), copy.form)
    return linear(hidden_nF, copy.down, copy.down_bias)
