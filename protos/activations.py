"""What happens between the projections of an expert, routed or shared: the gated and plain forms of `ExpertForm`.

Shapes: n rows, F hidden dim, I = 2F rows of gate over up (F without a gate).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from protos.model import Activation, ExpertForm


def activate(up_nI: Tensor, form: ExpertForm) -> Tensor:
    """From the first projections to what the last one sees. `up_nI` may be overwritten."""
    if form.glu == "plain":
        return _act(up_nI, form.activation)
    gate_nF, up_nF = up_nI.chunk(2, dim=-1)
    if form.glu == "gated":
        return _act(gate_nF, form.activation).mul_(up_nF)
    if form.glu == "softcapped":
        gate_nF, up_nF = gate_nF.float(), up_nF.float()
        capped_nF = torch.tanh(up_nF / form.limit) * form.limit
        linear_nF = torch.tanh(gate_nF / form.gate_cap) * form.gate_cap
        return (linear_nF * torch.sigmoid(gate_nF) * capped_nF).to(up_nI.dtype)
    up_nF = up_nF.clamp(min=-form.limit, max=form.limit)
    if form.glu == "clamped_after":
        return _act(gate_nF, form.activation).clamp(max=form.limit).mul_(up_nF)
    gate_nF = gate_nF.clamp(max=form.limit)
    if form.glu == "clamped":
        return _act(gate_nF, form.activation).mul_(up_nF)
    return (up_nF + 1).mul_(gate_nF * torch.sigmoid(gate_nF * form.alpha))  # gpt-oss


def _act(x_nF: Tensor, activation: Activation) -> Tensor:
    if activation == "silu":
        return F.silu(x_nF)
    if activation == "gelu":
        return F.gelu(x_nF)
    if activation == "gelu_tanh":
        return F.gelu(x_nF, approximate="tanh")
    relu_nF = F.relu(x_nF)
    return relu_nF if activation == "relu" else relu_nF.square()
