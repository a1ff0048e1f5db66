"""The MoE families of transformers as test cases: what each overrides in its family's tiny config.

A name is a model_type (inkling and nllb_moe: their usual names), or one with a variant for options that the first case
leaves idle. All 72 families of transformers 5.23 are here except two: doge (product keys over rank-1 experts: no expert
to place) and zaya (a router whose state passes from layer to layer).
"""

from dataclasses import dataclass, field
from typing import Any

from tests.family_configs import DIM, EXPERT_WIDTH

_SIGMOID_STD = 0.2  # wider, and every score saturates at 1
_EXPERT_WIDTH: dict[str, Any] = {"intermediate_size": EXPERT_WIDTH}


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyCase:
    """One tiny model: a model_type, what its config overrides, and the spread of its router's weights."""

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    router_std: float = 0.5  # decisive: near-ties would hide a wrong choice


_CODE2WAV: dict[str, Any] = {
    "codebook_size": 16,
    "num_quantizers": 2,
    "decoder_dim": 32,
    "upsample_rates": [2],
    "upsampling_ratios": [2],
}
_GEMMA: dict[str, Any] = {
    "num_experts": 8,
    "top_k_experts": 3,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 0,
}
_NEMOTRON: dict[str, Any] = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
    "moe_shared_expert_intermediate_size": 40,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 1,
    "use_mamba_kernels": False,
}
_NLLB: dict[str, Any] = {
    "d_model": DIM,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": EXPERT_WIDTH,
    "decoder_ffn_dim": EXPERT_WIDTH,
}
_DEEPSEEK_V4: dict[str, Any] = {"num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 8}


def _dbrx(norm: int) -> dict[str, Any]:
    return {
        "d_model": DIM,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 500000.0},
        "ffn_config": {
            "hidden_size": DIM,
            "ffn_hidden_size": EXPERT_WIDTH,
            "moe_num_experts": 8,
            "moe_top_k": 3,
            "moe_normalize_expert_weights": float(norm),
        },
    }


def _cohere(selection: str, combination: str) -> dict[str, Any]:
    return _EXPERT_WIDTH | {
        "expert_selection_fn": selection,
        "shared_expert_combination_strategy": combination,
        "num_shared_experts": 2,
        "prefix_dense_intermediate_size": 80,
        "num_experts_per_tok": 3,
    }


CASES: dict[str, FamilyCase] = {
    "mixtral": FamilyCase(model_type="mixtral", config=_EXPERT_WIDTH),
    "qwen2_moe": FamilyCase(model_type="qwen2_moe", config={"mlp_only_layers": [0]}),
    "qwen3_moe": FamilyCase(model_type="qwen3_moe", config={"mlp_only_layers": [1], "norm_topk_prob": True}),
    "qwen3_moe:raw": FamilyCase(model_type="qwen3_moe", config={"norm_topk_prob": False, "num_experts_per_tok": 3}),
    "qwen3_next": FamilyCase(model_type="qwen3_next", config={"mlp_only_layers": [0]}),
    "qwen3_5_moe": FamilyCase(model_type="qwen3_5_moe"),
    "qwen3_vl_moe": FamilyCase(model_type="qwen3_vl_moe", config={"text_config": {"mlp_only_layers": [0]}}),
    "olmoe": FamilyCase(model_type="olmoe", config=_EXPERT_WIDTH),
    "olmoe:renorm": FamilyCase(model_type="olmoe", config=_EXPERT_WIDTH | {"norm_topk_prob": True}),
    "deepseek_v2": FamilyCase(
        model_type="deepseek_v2", config={"topk_method": "greedy", "n_group": None, "topk_group": None}
    ),
    "deepseek_v2:group_limited": FamilyCase(
        model_type="deepseek_v2", config={"topk_method": "group_limited_greedy", "topk_group": 2}
    ),
    "deepseek_v3": FamilyCase(router_std=_SIGMOID_STD, model_type="deepseek_v3"),
    "deepseek_v3:raw": FamilyCase(
        router_std=_SIGMOID_STD,
        model_type="deepseek_v3",
        config={"norm_topk_prob": False, "n_group": 1, "topk_group": 1},
    ),
    "deepseek_v32": FamilyCase(router_std=_SIGMOID_STD, model_type="deepseek_v32"),
    "glm4_moe": FamilyCase(router_std=_SIGMOID_STD, model_type="glm4_moe", config={"n_group": 1, "topk_group": 1}),
    "glm4_moe:grouped": FamilyCase(router_std=_SIGMOID_STD, model_type="glm4_moe"),
    "glm4_moe_lite": FamilyCase(router_std=_SIGMOID_STD, model_type="glm4_moe_lite"),
    "glm4v_moe": FamilyCase(router_std=_SIGMOID_STD, model_type="glm4v_moe"),
    "glm_moe_dsa": FamilyCase(router_std=_SIGMOID_STD, model_type="glm_moe_dsa"),
    "glm5_next": FamilyCase(
        router_std=_SIGMOID_STD,
        model_type="glm5_next",
        config={"text_config": {"index_topk": 16, "qk_rope_head_dim": 0}},
    ),
    "gpt_oss": FamilyCase(model_type="gpt_oss", config=_EXPERT_WIDTH | {"num_experts_per_tok": 4}),
    "granitemoe": FamilyCase(model_type="granitemoe", config=_EXPERT_WIDTH),
    "granitemoe_swa": FamilyCase(model_type="granitemoe_swa", config=_EXPERT_WIDTH),
    "granitemoeshared": FamilyCase(model_type="granitemoeshared", config=_EXPERT_WIDTH),
    "granitemoehybrid": FamilyCase(
        model_type="granitemoehybrid",
        config=_EXPERT_WIDTH | {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16},
    ),
    "qwen3_omni_moe": FamilyCase(model_type="qwen3_omni_moe", config={"enable_audio_output": False}),
    "qwen3_omni_moe:talker": FamilyCase(
        model_type="qwen3_omni_moe",
        config={
            "code2wav_config": _CODE2WAV,
            "talker_config": {"spatial_merge_size": 2, "text_config": {"shared_expert_intermediate_size": 40}},
        },
    ),
    "qwen4_exp": FamilyCase(model_type="qwen4_exp"),
    "ernie4_5_moe": FamilyCase(
        model_type="ernie4_5_moe",
        router_std=0.2,
        config={"moe_num_experts": 8, "moe_k": 3, "moe_layer_end_index": 2, "moe_norm_min": 0.7},
    ),
    "ernie4_5_vl_moe": FamilyCase(
        model_type="ernie4_5_vl_moe",
        router_std=0.2,
        config={
            "text_config": {
                "moe_intermediate_size": [EXPERT_WIDTH, 24],
                "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [3, 3, 2]},
                "moe_num_experts": 8,
                "moe_k": 3,
                "moe_norm_min": 0.7,
            }
        },
    ),
    "hunyuan_v1_moe": FamilyCase(model_type="hunyuan_v1_moe", config=_EXPERT_WIDTH | {"moe_topk": 3}),
    "hunyuan_v1_moe:per_layer": FamilyCase(model_type="hunyuan_v1_moe", config=_EXPERT_WIDTH | {"moe_topk": [2, 3, 4]}),
    "hy_v3": FamilyCase(model_type="hy_v3", router_std=_SIGMOID_STD),
    "hy_v3:model_dtype_combine": FamilyCase(
        model_type="hy_v3", router_std=_SIGMOID_STD, config={"enable_moe_fp32_combine": False}
    ),
    "hy_v4": FamilyCase(model_type="hy_v4", router_std=_SIGMOID_STD),
    "llama4": FamilyCase(
        model_type="llama4",
        router_std=0.2,
        config={
            "text_config": _EXPERT_WIDTH | {"intermediate_size_mlp": 80, "moe_layers": [1, 2], "num_experts_per_tok": 1}
        },
    ),
    "llama4:top_2": FamilyCase(
        model_type="llama4",
        router_std=0.2,
        config={"text_config": _EXPERT_WIDTH | {"intermediate_size_mlp": 80, "num_experts_per_tok": 2}},
    ),
    "dbrx": FamilyCase(model_type="dbrx", config=_dbrx(1)),
    "dbrx:l2": FamilyCase(model_type="dbrx", config=_dbrx(2)),
    "phimoe": FamilyCase(model_type="phimoe", router_std=0.2, config=_EXPERT_WIDTH | {"router_jitter_noise": 0.3}),
    "jamba": FamilyCase(
        model_type="jamba",
        config=_EXPERT_WIDTH
        | {"use_mamba_kernels": False, "mamba_dt_rank": 8, "attn_layer_period": 3, "attn_layer_offset": 2},
    ),
    "lfm2_moe": FamilyCase(
        model_type="lfm2_moe",
        router_std=_SIGMOID_STD,
        config={"num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
    ),
    "lfm2_moe:raw": FamilyCase(
        model_type="lfm2_moe",
        router_std=_SIGMOID_STD,
        config={
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention", "conv"],
            "use_expert_bias": False,
            "norm_topk_prob": False,
        },
    ),
    "minimax": FamilyCase(model_type="minimax", config=_EXPERT_WIDTH),
    "minimax_m2": FamilyCase(model_type="minimax_m2", router_std=_SIGMOID_STD, config=_EXPERT_WIDTH),
    "minimax_m3_vl": FamilyCase(
        model_type="minimax_m3_vl",
        router_std=_SIGMOID_STD,
        config={"projector_hidden_size": 32, "text_config": _EXPERT_WIDTH | {"dense_intermediate_size": 80}},
    ),
    "laguna": FamilyCase(model_type="laguna", config={"moe_router_logit_softcapping": 2.0}),
    "cohere2_moe": FamilyCase(model_type="cohere2_moe", config=_cohere("softmax", "sum")),
    "cohere2_moe:sigmoid": FamilyCase(
        model_type="cohere2_moe", router_std=_SIGMOID_STD, config=_cohere("sigmoid", "sum")
    ),
    "cohere2_moe:average": FamilyCase(
        model_type="cohere2_moe",
        router_std=_SIGMOID_STD,
        config=_cohere("sigmoid", "average") | {"norm_topk_prob": False},
    ),
    "gemma4": FamilyCase(
        model_type="gemma4",
        config={"text_config": _GEMMA | {"enable_moe_block": True}},
    ),
    "diffusion_gemma": FamilyCase(model_type="diffusion_gemma", config={"text_config": _GEMMA}),
    "aria": FamilyCase(
        model_type="aria", config={"text_config": _EXPERT_WIDTH | {"moe_num_experts": 8, "moe_topk": 3}}
    ),
    "nemotron_h": FamilyCase(model_type="nemotron_h", router_std=_SIGMOID_STD, config=_NEMOTRON),
    "nemotron_h:latent": FamilyCase(
        model_type="nemotron_h", router_std=_SIGMOID_STD, config=_NEMOTRON | {"moe_latent_size": 24}
    ),
    "longcat_flash": FamilyCase(
        model_type="longcat_flash",
        router_std=0.2,
        config={
            "num_layers": 2,
            "ffn_hidden_size": 80,
            "expert_ffn_hidden_size": EXPERT_WIDTH,
            "moe_topk": 4,
            "zero_expert_num": 4,
            "head_dim": 8,
        },
    ),
    "switch_transformers": FamilyCase(
        model_type="switch_transformers",
        config={
            "d_model": DIM,
            "d_kv": 16,
            "d_ff": EXPERT_WIDTH,
            "num_heads": 4,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "expert_capacity": 3,
        },
    ),
    "nllb_moe": FamilyCase(model_type="nllb-moe", router_std=0.2, config=_NLLB),
    "nllb_moe:tight": FamilyCase(
        model_type="nllb-moe", router_std=0.2, config=_NLLB | {"moe_eval_capacity_token_fraction": 0.25}
    ),
    "nllb_moe:prioritised": FamilyCase(
        model_type="nllb-moe",
        router_std=0.2,
        config=_NLLB
        | {
            "moe_eval_capacity_token_fraction": 0.25,
            "batch_prioritized_routing": True,
            "normalize_router_prob_before_dropping": True,
            "router_bias": True,
        },
    ),
    "deepseek_v4": FamilyCase(model_type="deepseek_v4", config=_DEEPSEEK_V4 | {"mlp_layer_types": ["moe"] * 3}),
    "deepseek_v4:hash": FamilyCase(
        model_type="deepseek_v4", config=_DEEPSEEK_V4 | {"mlp_layer_types": ["hash_moe", "hash_moe", "moe"]}
    ),
    "step3p7": FamilyCase(
        model_type="step3p7",
        router_std=_SIGMOID_STD,
        config={
            "text_config": {
                "mlp_layer_types": ["dense", "sparse", "sparse"],
                "swiglu_limits": [0.0, 0.0, 0.3],
                "swiglu_limits_shared": [0.0, 0.3, 0.0],
            }
        },
    ),
    "afmoe": FamilyCase(model_type="afmoe", router_std=_SIGMOID_STD),
    "axk1": FamilyCase(model_type="axk1", router_std=_SIGMOID_STD),
    "axk2": FamilyCase(model_type="axk2", router_std=_SIGMOID_STD),
    "axk2:ungrouped": FamilyCase(
        model_type="axk2", router_std=_SIGMOID_STD, config={"n_group": None, "topk_group": None}
    ),
    "bailing_hybrid": FamilyCase(model_type="bailing_hybrid", router_std=_SIGMOID_STD),
    "beam": FamilyCase(model_type="beam", router_std=_SIGMOID_STD),
    "deepseek_ocr2": FamilyCase(
        model_type="deepseek_ocr2",
        config={"text_config": {"topk_method": "group_limited_greedy"}},
    ),
    "unlimited_ocr": FamilyCase(model_type="unlimited_ocr"),
    "dots1": FamilyCase(
        model_type="dots1", router_std=_SIGMOID_STD, config={"n_shared_experts": 2, "norm_topk_prob": True}
    ),
    "dots3_note": FamilyCase(
        model_type="dots3_note",
        router_std=_SIGMOID_STD,
        config={
            "text_config": {"per_layer_config": {}},
            "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": DIM},
            "audio_config": {"adapter_input_size": 32, "adapter_out_dim": DIM},
        },
    ),
    "exaone_moe": FamilyCase(model_type="exaone_moe", router_std=_SIGMOID_STD),
    "flex_olmo": FamilyCase(model_type="flex_olmo", config=_EXPERT_WIDTH),
    "flint": FamilyCase(model_type="flint", router_std=_SIGMOID_STD, config={"mlp_only_layers": [0]}),
    "inkling": FamilyCase(
        model_type="inkling_mm_model",
        router_std=_SIGMOID_STD,
        config={"vision_config": {"patch_size": 2, "n_layers": 4}},
    ),
    "inkling2": FamilyCase(
        model_type="inkling2",
        router_std=_SIGMOID_STD,
        config={"text_config": {"mlp_gate_softcap": 1.0, "mlp_up_softcap": 1.5}},
    ),
    "jetmoe": FamilyCase(model_type="jetmoe", config=_EXPERT_WIDTH | {"kv_channels": 16}),
    "kimi_linear": FamilyCase(model_type="kimi_linear", router_std=_SIGMOID_STD),
    "kolibri1": FamilyCase(model_type="kolibri1", router_std=_SIGMOID_STD, config={"norm_topk_prob": True}),
    "kolibri1:raw": FamilyCase(model_type="kolibri1", router_std=_SIGMOID_STD, config={"norm_topk_prob": False}),
    "mellum": FamilyCase(model_type="mellum"),
    "mimo_v2_flash": FamilyCase(model_type="mimo_v2_flash", router_std=_SIGMOID_STD),
    "mistral4": FamilyCase(model_type="mistral4", router_std=0.2),
    "mistral_large4": FamilyCase(model_type="mistral_large4", router_std=0.2),
    "muse_spark": FamilyCase(
        model_type="muse_spark",
        config={
            "text_config": {"moe_hidden_size": 24},
            "audio_config": {
                "num_hidden_layers": 1,
                "patch_sizes": [4],
                "hidden_sizes": [32],
                "depths": [1],
                "out_hidden_size": DIM,
            },
        },
    ),
    "openai_privacy_filter": FamilyCase(
        model_type="openai_privacy_filter", config=_EXPERT_WIDTH | {"num_experts_per_tok": 4}
    ),
    "solar_open": FamilyCase(model_type="solar_open", router_std=_SIGMOID_STD),
}
