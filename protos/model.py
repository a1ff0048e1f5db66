"""What a model is, as both sides of the wire must agree on it: layers, gate, expert form, tensor names.

`read_model` (protos/checkpoint.py) builds a `ModelSpec` from a Hugging Face directory. The options are declarative:
a model family is a row of values, not code (the axes are those of the MoE families of transformers).

Shapes: D model dim, F expert hidden dim, E experts, K top-k.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLimit:
    """Group-limited selection (DeepSeek-V3): only experts of the best `top_groups` of `num_groups` may be chosen.

    A group's score is the sum of its two best selection scores; experts outside the chosen groups are masked with
    -inf (transformers 5.23 masks with -inf in the V3 line).
    """

    num_groups: int
    top_groups: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GateSpec:
    """Exact top-k gating of one family (arXiv:1701.06538 and its many successors).

    logits = x W^T in `logits_dtype`; score = softmax or sigmoid of the logits in fp32; choose the top-k of
    score (+ selection bias, which never enters the weights), inside the best groups if limited; weight = score of
    the chosen, divided by (their sum + renorm_eps) if `renorm` is "sum"; times `scale`; kept in fp32 or cast to the
    model dtype.
    """

    num_experts: int
    top_k: int
    score: Literal["softmax", "sigmoid"]
    logits_dtype: Literal["model", "float32"] = "model"
    selection_bias: bool = False
    groups: GroupLimit | None = None
    renorm: Literal["none", "sum"] = "none"
    renorm_eps: float = 0.0
    scale: float = 1.0
    weight_dtype: Literal["float32", "model"] = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedSpec:
    """The shared expert every token passes through; the router computes it while the routed rows are away.

    hidden_dim is its F; `gated`: the output is multiplied by sigmoid(x w_gate^T) (Qwen2-MoE).
    """

    hidden_dim: int
    gated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One MoE model: everything the router, the expert servers and the planner need to know without weights."""

    path: Path
    family: str  # model_type of config.json
    dtype: Literal["float32", "bfloat16", "float16"]  # of the checkpoint's expert tensors
    dim: int  # D
    hidden_dim: int  # F
    layers: tuple[str, ...]  # names of the MoE layers: the transformer layer they sit in, in order
    gate: GateSpec
    shared: SharedSpec | None = None
    activation: Literal["silu"] = "silu"  # SwiGLU: silu(x W_gate^T) * (x W_up^T), then W_down^T

    @property
    def num_experts(self) -> int:
        return self.gate.num_experts

    @property
    def top_k(self) -> int:
        return self.gate.top_k

    @property
    def expert_params(self) -> int:
        """Parameters of one routed expert: gate, up and down projections."""
        return 3 * self.dim * self.hidden_dim
