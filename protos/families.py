"""The MoE families: one row of options each.

The rows state what the family's block in transformers 5.23 computes (models/<family>/modeling_<family>.py), and for
families without a class there what their own definition says; defaults are those of the configuration class. A new
family is a new row; how rows are read is in configfile.py, what the options mean in model.py.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import inf

from protos.family_lines import (
    CLAMPED_V3,
    GEMMA4,
    GLM4,
    GPT_OSS,
    GRANITE,
    GRANITE_SHARED,
    LAGUNA,
    MINIMAX_M2,
    MINIMAX_M3,
    MIXTRAL,
    OLMOE,
    QWEN,
    QWEN_NORMED,
    QWEN_SHARED,
    SHARED,
    SQRT_SOFTPLUS,
    STEP3,
    V2,
    V3,
    V3_UNGROUPED,
)
from protos.settings import ACTIVATION, TOP_K, WIDTH, Family, SharedRow, Variant, key, need, only

ALIASES: Mapping[str, str] = {"step3p5": "step3p7"}  # Step-3.5-Flash is what Step-3.7 has as its text model

FAMILIES: Mapping[str, Family] = {
    "mixtral": MIXTRAL,
    "minimax": MIXTRAL,
    "qwen2_moe": replace(QWEN, shared=QWEN_SHARED),
    "qwen3_moe": QWEN,
    "qwen3_next": replace(QWEN_NORMED, shared=QWEN_SHARED),
    "qwen4_exp": replace(QWEN_NORMED, shared=QWEN_SHARED),
    "qwen3_5_moe": replace(QWEN, renorm=True, shared=QWEN_SHARED),
    "qwen3_vl_moe": replace(QWEN, renorm=True),
    "qwen3_omni_moe": QWEN_NORMED,  # the thinker
    "mellum": QWEN_NORMED,
    "olmoe": OLMOE,
    "flex_olmo": OLMOE,
    "jamba": replace(OLMOE, renorm=False),
    "flint": replace(
        QWEN_NORMED,
        score="sigmoid",
        logits_dtype="float32",
        router_dtype="float32",
        weight_dtype="float32",
        shared=SharedRow(width=need("shared_expert_intermediate_size")),
    ),
    "hunyuan_v1_moe": replace(
        MIXTRAL,
        top_k=replace(TOP_K, per_layer=True),
        logits_dtype="float32",
        router_dtype="float32",
        shared=SharedRow(count=key("num_shared_expert", default=1)),
        variants=(only("use_mixed_mlp_moe", True),),
    ),
    "dbrx": replace(
        MIXTRAL,
        dim=need("d_model"),
        hidden_dim=need("ffn_hidden_size"),
        stacks={"": need("n_layers", "num_hidden_layers")},
        section="ffn_config",
        score_dtype="model",
        renorm_kind="norm",
        renorm_p=key("moe_normalize_expert_weights", default=1.0),
        activation="silu",
        variants=(
            Variant(
                setting=key("moe_normalize_expert_weights", default=1.0), values={None: {"renorm": False}, ...: {}}
            ),
            Variant(setting=key("ffn_act_fn.name", default="silu"), values={"silu": {}}),
        ),
    ),
    "ernie4_5_moe": Family(
        logits_dtype="float32",
        router_dtype="float32",
        selection_bias=True,
        renorm=True,
        renorm_kind="clamp",
        renorm_eps=key("moe_norm_min", default=1e-12),
        weight_dtype="model",
        shared=SharedRow(count=key("moe_num_shared_experts", default=2)),
        variants=(
            only("moe_gate", "topk"),
            only("moe_gate_act", "softmax"),
            only("moe_use_aux_free", True),
            only("moe_norm_gate_logits", True),
        ),
        ignored=frozenset({"moe_capacity"}),  # of training
    ),
    "phimoe": Family(
        hidden_dim=WIDTH,
        score="logits",
        score_dtype="model",
        weight_dtype="model",
        selection="sparsemixer",
        jitter=key("router_jitter_noise", default=0.01),
        variants=(Variant(setting=TOP_K, values={2: {}}),),  # its sparsemixer chooses two, whatever the key says
    ),
    "grok-1": Family(  # xai-org/grok-1 model.py: probabilities of the chosen as they are, jax.nn.gelu's tanh form
        hidden_dim=WIDTH,
        logits_dtype="float32",
        weight_dtype="model",
        activation=key("hidden_act", default="gelu_tanh"),
    ),
    "deepseek": Family(  # DeepSeek-MoE 16B (remote code)
        logits_dtype="float32",
        renorm=key("norm_topk_prob", default=False),
        renorm_eps=1e-20,
        shared=replace(SHARED, count=key("n_shared_experts")),
        variants=(only("scoring_func", "softmax"),),
    ),
    "deepseek_v2": V2,
    "deepseek_ocr2": V2,
    "unlimited_ocr": V2,
    "deepseek_v3": V3,
    "kimi_k2": V3,
    "deepseek_v32": V3,
    "axk1": replace(V3, output_norm=True),
    "axk2": replace(
        V3, num_groups=key("n_group", default=None), top_groups=key("topk_group", default=None), excluded="zero"
    ),
    "bailing_hybrid": replace(
        V3,
        shared=replace(SHARED, count=key("num_shared_experts", default=1)),
        variants=(*V3.variants, only("moe_router_enable_expert_bias", True)),
        ignored=frozenset({"moe_shared_expert_intermediate_size"}),  # which is the routed experts', as shapes tell
    ),
    "beam": replace(
        V3,
        router_dtype="float32",
        scale=1.0,
        output_scale=key("routed_scaling_factor", default=2.5),
        shared=None,
    ),
    "glm4_moe": GLM4,
    "glm4v_moe": GLM4,
    "solar_open": GLM4,
    "glm4_moe_lite": replace(GLM4, scale=key("routed_scaling_factor", default=1.8)),
    "glm_moe_dsa": V3_UNGROUPED,
    "dots1": replace(
        GLM4,
        renorm=key("norm_topk_prob", default=False),
        shared=replace(SHARED, count=need("n_shared_experts")),
        variants=(only("topk_method", "noaux_tc"), only("scoring_func", "sigmoid", "noaux_tc")),  # the hub's, the same
    ),
    "dots3_note": replace(
        GLM4,
        shared=replace(SHARED, width=need("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size")),
    ),
    "exaone_moe": V3_UNGROUPED,
    "glm5_next": CLAMPED_V3,
    "hy_v4": replace(
        CLAMPED_V3,
        scale=key("routed_scaling_factor", default=2.827),
        shared=replace(SHARED, activation=ACTIVATION, limit=inf),
    ),
    "kimi_linear": replace(
        V3_UNGROUPED,
        scale=key("routed_scaling_factor", default=2.446),
        variants=(*V3.variants, only("moe_router_activation_func", "sigmoid"), only("use_grouped_topk", True)),
    ),
    "mimo_v2_flash": replace(
        GLM4,
        shared=None,
        variants=(
            *GLM4.variants,
            Variant(setting=key("routed_scaling_factor", default=1.0), values={None: {"scale": 1.0}, ...: {}}),
        ),
    ),
    "nemotron_h": replace(
        GLM4,
        stacks={"": need("num_hidden_layers", "layers_block_type", "layer_types")},
        glu="plain",
        activation=key("mlp_hidden_act", default="relu2"),
        latent_dim=key("moe_latent_size"),
        shared=SharedRow(width=need("moe_shared_expert_intermediate_size")),
        ignored=frozenset({"n_shared_experts", "hidden_act"}),
    ),
    "deepseek_v4": Family(
        score="sqrt_softplus",
        score_dtype="model",
        selection_bias=True,
        renorm=True,
        renorm_eps=1e-20,
        scale=key("routed_scaling_factor", default=1.5),
        glu="clamped",
        limit=key("swiglu_limit", default=10.0),
        shared=SharedRow(),
        variants=(
            SQRT_SOFTPLUS,
            only("topk_method", "noaux_tc"),
            only("norm_topk_prob", True),
            only("n_shared_experts", 1),
        ),
    ),
    "mistral4": replace(
        GLM4,
        score="softmax",
        logits_dtype="model",
        score_dtype="model",
        selection_bias=False,
        excluded="zero",
        variants=(),
    ),
    "mistral_large4": replace(
        GLM4, score="softmax", router_dtype="float32", selection_bias=False, excluded="zero", renorm=True, variants=()
    ),
    "afmoe": Family(
        score="sigmoid",
        selection_bias=True,
        renorm=True,
        renorm_eps=1e-20,
        scale=key("route_scale", default=1.0),
        shared=SharedRow(count=key("num_shared_experts", default=2)),
        variants=(
            only("score_func", "sigmoid"),
            only("route_norm", True),
        ),
    ),
    "hy_v3": Family(
        score="sigmoid",
        logits_dtype="float32",
        selection_bias=True,
        renorm=True,
        renorm_eps=1e-20,
        scale=key("router_scaling_factor", default=2.826),
        shared=SharedRow(count=key("num_shared_experts", default=1)),
        variants=(only("moe_router_use_sigmoid", True), only("moe_router_enable_expert_bias", True)),
        ignored=frozenset({"enable_moe_fp32_combine"}),  # sums are taken in fp32 in any case
    ),
    "minimax_m2": MINIMAX_M2,
    "minimax_m3_vl": MINIMAX_M3,
    "step3p7": STEP3,
    "laguna": LAGUNA,
    "lfm2_moe": Family(
        score="sigmoid",
        score_dtype="model",
        selection_bias=key("use_expert_bias", default=True),
        renorm=key("norm_topk_prob", default=True),
        renorm_eps=1e-6,
        scale=key("routed_scaling_factor", default=1.0),
        weight_dtype="model",
        activation="silu",
    ),
    "kolibri1": Family(
        score="logits",
        logits_dtype="float32",
        selection_bias=True,
        chosen="sigmoid",
        renorm=key("norm_topk_prob", default=False),
        shared=SharedRow(width=need("shared_expert_intermediate_size")),
    ),
    "inkling2": Family(
        score="sigmoid",
        logits_dtype="float32",
        router_dtype="float32",
        selection_bias=True,
        renorm=True,
        renorm_eps=1e-20,
        scale=key("route_scale", "routed_scaling_factor", default=8.0),
        glu="softcapped",
        activation="silu",
        gate_cap=key("mlp_gate_softcap", default=4.0),
        limit=key("mlp_up_softcap", default=25.0),
        variants=(replace(SQRT_SOFTPLUS, setting=key("scoring_func", default="sigmoid")),),
    ),
    "longcat_flash": Family(
        stacks={"": need("num_layers", "num_hidden_layers")},
        num_experts=need("n_routed_experts"),
        num_identity=key("zero_expert_num", default=256),
        logits_dtype="float32",
        selection_bias=True,
        scale=key("routed_scaling_factor", default=6.0),
        variants=(
            only("zero_expert_type", "identity"),
            only("router_bias", False),
        ),
    ),
    "gpt_oss": GPT_OSS,
    "openai_privacy_filter": replace(
        GPT_OSS,
        logits_dtype="float32",
        score_dtype="float32",
        weight_dtype="float32",
        averages=True,
        interleaved=False,
    ),
    "granitemoe": GRANITE,
    "granitemoeshared": GRANITE_SHARED,
    "granitemoehybrid": GRANITE_SHARED,
    "granitemoe_swa": GRANITE_SHARED,
    "jetmoe": replace(GRANITE, output_bias=True, activation=key("activation_function", default="silu")),
    "aria": replace(
        GRANITE,
        score_dtype="model",
        activation="silu",  # whatever hidden_act says: that is the shared experts'
        shared=SharedRow(count=key("moe_num_shared_experts", default=2), activation=key("hidden_act", default="silu")),
    ),
    "cohere2_moe": replace(
        GRANITE,
        shared=SharedRow(count=key("num_shared_experts", default=0)),
        variants=(
            Variant(
                setting=key("expert_selection_fn", default="softmax"),
                values={
                    "softmax": {},
                    "sigmoid": {
                        "chosen": "sigmoid",
                        "score_dtype": "model",
                        "renorm": key("norm_topk_prob", default=True),
                    },
                },
            ),
            Variant(
                setting=key("shared_expert_combination_strategy", default="average"),
                values={
                    "sum": {},
                    "average": {"shared": SharedRow(count=key("num_shared_experts", default=0), combine="average")},
                },
            ),
        ),
        ignored=frozenset({"norm_topk_prob"}),
    ),
    "llama4": replace(GRANITE, chosen="sigmoid", weighs_input=True, shared=SharedRow()),
    "gemma4": GEMMA4,
    "diffusion_gemma": GEMMA4,
    "switch_transformers": Family(
        dim=need("d_model"),
        hidden_dim=need("d_ff"),
        top_k=1,
        stacks={"encoder": need("num_layers"), "decoder": need("num_decoder_layers")},
        logits_dtype="float32",
        logit_bias=key("router_bias", default=False),
        weight_dtype="model",
        capacity="sequence",
        glu="plain",
        activation=key("dense_act_fn", default="relu"),
        variants=(only("router_dtype", "float32"),),
    ),
    "nllb-moe": Family(
        dim=need("d_model"),
        hidden_dim=need("encoder_ffn_dim", "decoder_ffn_dim"),
        top_k=2,
        stacks={"encoder": need("encoder_layers"), "decoder": need("decoder_layers")},
        logits_dtype="float32",
        logit_bias=key("router_bias", default=False),
        weight_dtype="model",
        capacity="batch",
        glu="plain",
        biases=True,
        activation=key("activation_function", default="relu"),
        variants=(
            only("router_dtype", "float32"),
            only("second_expert_policy", "all"),
        ),
    ),
}
