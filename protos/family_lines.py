"""The lines that MoE families descend from: the rows that `families.py` varies.

What the options mean is in model.py, how rows are read in configfile.py.
"""

from dataclasses import replace

from protos.settings import ACTIVATION, MOE_WIDTH, WIDTH, Family, SharedRow, Variant, key, need, only

# ---------------------------------------------------------------- softmax over all experts (Mixtral, Qwen)

MIXTRAL = Family(hidden_dim=WIDTH, renorm=True)  # weights stay fp32; jitter is for training only
QWEN = Family(weight_dtype="model", renorm=key("norm_topk_prob", default=False))
QWEN_NORMED = replace(QWEN, renorm=key("norm_topk_prob", default=True))
QWEN_SHARED = SharedRow(gated=True, width=need("shared_expert_intermediate_size"))
OLMOE = replace(QWEN, hidden_dim=WIDTH)

# ---------------------------------------------------------------- DeepSeek

SHARED = SharedRow(count=key("n_shared_experts", "num_shared_experts", default=1))
V2 = Family(
    logits_dtype="float32",
    scale=key("routed_scaling_factor", default=1.0),
    shared=replace(SHARED, count=key("n_shared_experts", default=2)),
    ignored=frozenset({"n_group", "topk_group"}),  # greedy does not look at the groups
    variants=(
        # true is refused: DeepSeek's own code normalises then, and transformers' does not look at the key
        Variant(setting=key("norm_topk_prob", default=False), values={False: {}, None: {}}),
        Variant(
            setting=key("topk_method", default="greedy"),
            values={
                "greedy": {},
                "group_limited_greedy": {
                    "num_groups": need("n_group"),
                    "top_groups": need("topk_group"),
                    "group_score": "max",
                    "excluded": "zero",
                },
            },
        ),
        only("scoring_func", "softmax"),
    ),
)
V3 = Family(
    score="sigmoid",
    logits_dtype="float32",
    selection_bias=True,
    num_groups=key("n_group", "num_expert_group", default=8),
    top_groups=key("topk_group", default=4),
    renorm=key("norm_topk_prob", "moe_renormalize", default=True),
    renorm_eps=1e-20,
    scale=key("routed_scaling_factor", "route_scale", default=2.5),
    shared=SHARED,
    variants=(
        only("topk_method", "noaux_tc"),
        Variant(setting=key("scoring_func", "score_function", default="sigmoid"), values={"sigmoid": {}}),
    ),
)
V3_UNGROUPED = replace(
    V3, num_groups=key("n_group", "num_expert_group", default=1), top_groups=key("topk_group", default=1)
)
GLM4 = replace(V3_UNGROUPED, scale=key("routed_scaling_factor", default=1.0))
CLAMPED_V3 = replace(
    V3_UNGROUPED,
    glu="clamped",
    activation="silu",  # whatever hidden_act says: that is the shared experts'
    limit=key("swiglu_limit", default=10.0),
    shared=replace(SHARED, activation=ACTIVATION),
)
SQRT_SOFTPLUS = Variant(
    setting=key("scoring_func", default="sqrtsoftplus"),
    values={"sqrtsoftplus": {"score": "sqrt_softplus"}, "sigmoid": {"score": "sigmoid"}, "softmax": {}},
)

# ---------------------------------------------------------------- logits first, then a function of the chosen

GRANITE = Family(hidden_dim=WIDTH, score="logits", chosen="softmax", weight_dtype="model")
# their shared MLP belongs to the decoder layer
GRANITE_SHARED = replace(GRANITE, ignored=frozenset({"shared_intermediate_size"}))
GPT_OSS = replace(
    GRANITE,
    score_dtype="model",
    logit_bias=True,
    glu="gpt_oss",
    activation="silu",
    biases=True,
    limit=key("swiglu_limit", default=7.0),
    alpha=key("swiglu_alpha", default=1.702),
    interleaved=True,
)
GEMMA4 = Family(
    input_norm=True,
    renorm=True,
    per_expert_scale=True,
    activation=key("hidden_activation", default="gelu_pytorch_tanh"),
)

# ---------------------------------------------------------------- MiniMax-M2: sigmoid without an epsilon

MINIMAX_M2 = Family(
    hidden_dim=WIDTH,
    score="sigmoid",
    selection_bias=True,
    renorm=True,
    variants=(only("scoring_func", "sigmoid"), only("use_routing_bias", True)),
)
MINIMAX_M3 = replace(
    MINIMAX_M2,
    glu="gpt_oss",
    activation="silu",
    limit=key("swiglu_limit", default=7.0),
    alpha=key("swiglu_alpha", default=1.702),
    output_scale=key("routed_scaling_factor", default=2.0),
    shared=SharedRow(width=need("shared_intermediate_size")),
    variants=(*MINIMAX_M2.variants, only("n_shared_experts", 1)),
)
STEP3 = replace(
    MINIMAX_M2,
    hidden_dim=MOE_WIDTH,
    glu="clamped_after",
    activation="silu",  # the hub says "swigluoai", and means the form
    limit=replace(key("swiglu_limits"), per_layer=True),
    output_scale=key("moe_router_scaling_factor", default=1.0),
    shared=SharedRow(
        width=need("share_expert_dim", "share_expert_dims"),
        limit=replace(key("swiglu_limits_shared"), per_layer=True),
    ),
    variants=(
        only("moe_router_activation", "sigmoid"),
        only("norm_expert_weight", True),
        only("use_moe_router_bias", True),
    ),
    ignored=frozenset({"gating", "need_fp32_gate"}),  # attention's; logits' precision, which transformers leaves
)
LAGUNA = replace(
    MINIMAX_M2,
    hidden_dim=MOE_WIDTH,
    logit_softcap=key("moe_router_logit_softcapping", default=0.0),
    weight_dtype="model",
    output_scale=key("moe_routed_scaling_factor", default=1.0),
    shared=SharedRow(width=need("shared_expert_intermediate_size")),
    variants=(only("moe_apply_router_weight_on_input", False), only("moe_router_use_sigmoid", True)),
    ignored=frozenset({"gating", "gating_types"}),  # attention's
)
