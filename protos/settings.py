"""The vocabulary of protos/families.py: how a family's row says where an option's value comes from.

An option is a plain value the family fixes, or a `Setting` that its config.json holds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from protos.model import Activation, Score

# sections of config.json that describe the text model of a composite one
COMPOSITES = ("text_config", "thinker_config", "llm_config", "language_config")

Scalar = int | float | bool | str | None


@dataclass(frozen=True, slots=True)
class Setting:
    """A value of config.json: the names it goes by, and what it is where the file does not say.

    `required`: the file has to say. `per_layer`: the value may be a list with an entry for every layer.
    """

    keys: tuple[str, ...]
    default: Scalar = None
    required: bool = False
    per_layer: bool = False


def key(*names: str, default: Scalar = None) -> Setting:
    """A setting that may be absent."""
    return Setting(names, default)


def need(*names: str) -> Setting:
    """A setting that must be there."""
    return Setting(names, required=True)


NUM_EXPERTS = need("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TOP_K = need(
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "moe_top_k",
    "top_k_experts",
    "experts_per_token",
)
DIM = need("hidden_size")
WIDTH = need("intermediate_size")
MOE_WIDTH = need("moe_intermediate_size", "expert_ffn_hidden_size")
ACTIVATION = key("hidden_act", "hidden_activation", default="silu")

Whole = Setting | int
Number = Setting | float
Flag = Setting | bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedRow:
    """The shared experts: `width` wide each, or as wide as a routed one, and `count` of them side by side."""

    gated: bool = False
    width: Setting | None = None
    count: Whole = 1
    limit: Number | None = None  # None: the routed experts' limit
    activation: Setting | Activation | None = None  # None: the routed experts' activation
    combine: Literal["sum", "average"] = "sum"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A setting whose value chooses among forms of the family: each value with the fields it replaces."""

    setting: Setting
    values: Mapping[Any, Mapping[str, Any]]


def only(name: str, *values: Scalar) -> Variant:
    """A key that says what the family does anyway: the first value if it is absent, and no others than these."""
    return Variant(setting=key(name, default=values[0]), values={value: {} for value in values})


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row: the options of `BlockSpec`, fixed by the family or read from its config.json."""

    # sizes
    dim: Setting = DIM
    hidden_dim: Setting = MOE_WIDTH
    num_experts: Setting = NUM_EXPERTS
    top_k: Whole = TOP_K
    stacks: Mapping[str, Setting] = field(default_factory=lambda: {"": need("num_hidden_layers")})
    section: str = ""  # a nested object of config.json that holds some of the keys
    # gate, see GateSpec
    score: Score = "softmax"
    num_identity: Whole = 0
    logits_dtype: Literal["model", "float32"] = "model"
    router_dtype: Literal["model", "float32"] = "model"
    logit_bias: Flag = False
    logit_softcap: Number = 0.0  # 0: none
    input_norm: bool = False
    score_dtype: Literal["model", "float32"] = "float32"
    selection: Literal["top_k", "sparsemixer"] = "top_k"
    selection_bias: Flag = False
    num_groups: Whole = 1
    top_groups: Whole = 1
    group_score: Literal["top2_sum", "max"] = "top2_sum"
    excluded: Literal["-inf", "zero"] = "-inf"
    jitter: Number = 0.0
    chosen: Literal["score", "softmax", "sigmoid"] = "score"
    renorm: Flag = False
    renorm_kind: Literal["sum", "clamp", "norm"] = "sum"
    renorm_eps: Number = 0.0
    renorm_p: Number = 1.0
    scale: Number = 1.0
    averages: bool = False  # weights are divided by K, and the routed sum is multiplied by it
    per_expert_scale: bool = False
    weight_dtype: Literal["model", "float32"] = "float32"
    capacity: Literal["sequence", "batch"] | None = None
    # experts, see ExpertForm
    glu: Literal["gated", "clamped", "clamped_after", "gpt_oss", "softcapped", "plain"] = "gated"
    activation: Setting | Activation = ACTIVATION
    biases: bool = False
    limit: Number = float("inf")
    alpha: Number = 1.0
    gate_cap: Number = float("inf")
    weighs_input: bool = False
    interleaved: bool = False  # rows of a fused gate_up_proj alternate: gate, up, gate, up
    # around
    shared: SharedRow | None = None
    latent_dim: Setting | None = None
    output_scale: Number = 1.0
    output_bias: bool = False
    output_norm: bool = False
    variants: tuple[Variant, ...] = ()
    ignored: frozenset[str] = frozenset()  # keys that the family's own code does not read


def settings_of(row: Family) -> list[Setting]:
    """Every setting that a row reads by itself (its variants' replacements not included)."""
    values = [getattr(row, name) for name in row.__dataclass_fields__]
    if row.shared is not None:
        values += [getattr(row.shared, name) for name in row.shared.__dataclass_fields__]
    values += [*row.stacks.values(), *(variant.setting for variant in row.variants)]
    return [value for value in values if isinstance(value, Setting)]
