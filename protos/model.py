"""What a model is, as both sides of the wire must agree on it: layers, gate, expert form, tensor names.

`read_model` (protos/checkpoint.py) builds a `ModelSpec` from a Hugging Face directory. The options are declarative:
a model family is a row of values, not code (the axes are those of the MoE families of transformers).

Shapes: D model dim, L expert input dim (D unless latent projections surround the experts), F expert hidden dim,
E routed experts, K top-k.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
Score = Literal["softmax", "sigmoid", "sqrt_softplus", "logits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLimit:
    """Group-limited selection (DeepSeek-V2, V3): only experts of the best `top_groups` of `num_groups` may be chosen.

    A group's score is the sum of its two best selection scores, or its best one; experts outside the chosen groups
    are masked with -inf or with 0 (which a positive score always beats, a negative one does not).
    """

    num_groups: int
    top_groups: int
    score: Literal["top2_sum", "max"] = "top2_sum"
    excluded: Literal["-inf", "zero"] = "-inf"


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnCapacity:
    """A capacity that is part of the model: which tokens an expert takes depends on the other tokens of the request.

    "sequence": Switch (arXiv:2101.03961), the first `capacity` tokens of each expert.
    "batch": NLLB (arXiv:2207.04672), top-2 with ceil(token_fraction * T) places, else 2 * ceil(T / E); second choices
    queue behind all first ones, and weights are normalised over both before or after the dropping.
    """

    kind: Literal["sequence", "batch"]
    capacity: int | None = None
    token_fraction: float = 0.0
    by_priority: bool = False  # tokens with the highest probability first instead of in their order
    normalise_before: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GateSpec:
    """Exact top-k gating of one family (arXiv:1701.06538 and its many successors).

    logits = x W^T in `logits_dtype` (+ bias), soft-capped with tanh; score of every choice in
    `score_dtype`; the top-k of score (+ selection bias, which never enters the weights), inside the best groups if
    limited, or those the token id names (`selection="hash"`); weight = `chosen` function of the chosen scores, divided
    as `renorm` says; times `scale`; kept or cast to the model dtype; times the expert's own factor.

    `renorm`: "sum": sum + renorm_eps; "clamp": the sum, at least renorm_eps; "norm": the renorm_p norm.
    `selection="sparsemixer"` (Phi-3.5-MoE, arXiv:2409.12136): one expert after another is the best of the rest, its
    weight the softmax over those logits that are within the relative margin 2 * jitter of it.
    Choices `num_experts` to `num_experts + num_identity - 1` are identity experts: they return the token itself.
    """

    num_experts: int
    top_k: int
    score: Score
    num_identity: int = 0
    logits_dtype: Literal["model", "float32"] = "model"
    router_dtype: Literal["model", "float32"] = "model"  # in which the router weight itself is kept
    logit_bias: bool = False
    logit_softcap: float | None = None
    input_norm_eps: float | None = None  # x / rms(x) * scale_D / sqrt(D) before the gate (Gemma 4)
    score_dtype: Literal["float32", "model"] = "float32"
    selection: Literal["top_k", "sparsemixer", "hash"] = "top_k"
    selection_bias: bool = False
    groups: GroupLimit | None = None
    jitter: float = 0.0
    chosen: Literal["score", "softmax", "sigmoid"] = "score"
    renorm: Literal["none", "sum", "clamp", "norm"] = "none"
    renorm_eps: float = 0.0
    renorm_p: float = 1.0
    scale: float = 1.0
    per_expert_scale: bool = False
    weight_dtype: Literal["float32", "model"] = "float32"
    capacity: OwnCapacity | None = None

    @property
    def num_choices(self) -> int:
        """What the gate chooses from: routed and identity experts."""
        return self.num_experts + self.num_identity

    @property
    def leaves_gaps(self) -> bool:
        """Whether some of the T*K choices need no expert server."""
        return self.num_identity > 0 or self.capacity is not None

    @property
    def needs_token_ids(self) -> bool:
        return self.selection == "hash"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertForm:
    """The function of one expert: down(act(x)), with or without a gate.

    "gated": act(gate) * up (arXiv:2002.05202); "clamped": gate <= limit and |up| <= limit first; "clamped_after":
    act(gate) <= limit and |up| <= limit; "gpt_oss": clamped, then gate * sigmoid(alpha * gate) * (up + 1);
    "softcapped": cap(gate) * sigmoid(gate) * cap(up), cap(v) = c * tanh(v / c) with gate_cap and limit;
    "plain": act(up), without a gate.
    """

    glu: Literal["gated", "clamped", "clamped_after", "gpt_oss", "softcapped", "plain"] = "gated"
    activation: Activation = "silu"
    biases: bool = False
    limit: float = float("inf")
    alpha: float = 1.0
    gate_cap: float = float("inf")
    weighs_input: bool = False  # the gate weight multiplies the expert's input, not its output (Llama 4)

    @property
    def gated(self) -> bool:
        return self.glu != "plain"


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedSpec:
    """The shared expert every token passes through; the router computes it while the routed rows are away.

    hidden_dim is its F; `gated`: the output is multiplied by sigmoid(x w_gate^T) (Qwen2-MoE); "average": the block
    returns (routed + shared) / 2 (Cohere 2).
    """

    hidden_dim: int
    gated: bool = False
    combine: Literal["sum", "average"] = "sum"
    form: ExpertForm = ExpertForm()


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSpec:
    """One MoE layer: gate, expert form, shared expert, and what surrounds the routed experts.

    routed sum times `output_scale`; back to D through the second latent projection where `latent_dim` is set; plus
    shared expert; plus a learned bias (`output_bias`); RMS norm (`output_norm_eps`) last.
    """

    gate: GateSpec
    form: ExpertForm = ExpertForm()
    shared: SharedSpec | None = None
    latent_dim: int | None = None
    output_scale: float = 1.0
    output_bias: bool = False
    output_norm_eps: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One MoE model: everything the router, the expert servers and the planner need to know without weights."""

    path: Path
    family: str  # model_type of config.json
    dtype: Literal["float32", "bfloat16", "float16"]  # the model's; packed experts are dequantised to it
    dim: int  # D
    hidden_dim: int  # F
    blocks: Mapping[str, BlockSpec]  # by MoE layer: the transformer layer it sits in, "encoder.3" where there are two
    quantisation: str = ""  # of the first quantised expert, for people; "": all experts are stored plain

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the MoE layers, in order."""
        return tuple(self.blocks)

    @property
    def num_experts(self) -> int:
        return self._first.gate.num_experts

    @property
    def top_k(self) -> int:
        return self._first.gate.top_k

    @property
    def expert_dim(self) -> int:
        """L: the width of the rows that travel to the expert servers."""
        return self._first.latent_dim or self.dim

    @property
    def expert_params(self) -> int:
        """Parameters of one routed expert: its two or three projections and their biases."""
        form, rows = self._first.form, self.hidden_dim * (2 if self._first.form.gated else 1)
        return (rows + self.hidden_dim) * self.expert_dim + (rows + self.expert_dim if form.biases else 0)

    @property
    def _first(self) -> BlockSpec:
        return next(iter(self.blocks.values()))
