"""The MoE families of transformers as tiny configurations: what each test case overrides in its family's config.

A case is a hub-style config: the sizes of TEXT (and VISION for the towers of composite models) replace the family's
own wherever its config class has the key, then come the case's overrides. D=64, expert width 48, 8 experts (16 in 4
groups where the family knows groups), 3 layers, the first one dense where the family can. Options that change the result
sit at values where they do: limits and soft-caps bite, scales differ from 1. No two of D, expert width and its double are equal:
a transposed matrix shows in its shape.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

DIM, EXPERT_WIDTH, NUM_LAYERS = 64, 48, 3

TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": DIM,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 80,
    "moe_intermediate_size": EXPERT_WIDTH,
    "shared_expert_intermediate_size": 40,
    "num_local_experts": 8,
    "num_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "first_k_dense_replace": 1,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 0.5,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "index_topk": 4,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "sliding_window": 8,
}
_GROUPED: dict[str, Any] = {
    "n_routed_experts": 16,
    "num_local_experts": 16,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_experts_per_token": 4,
    "n_group": 4,
    "num_expert_group": 4,
    "topk_group": 2,
}
VISION: dict[str, Any] = {
    "depth": 1,
    "num_hidden_layers": 1,
    "encoder_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "out_hidden_size": DIM,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "d_model": 32,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
}
_SIGMOID_STD = 0.2  # wider, and every score saturates at 1
_EXPERT_WIDTH: dict[str, Any] = {"intermediate_size": EXPERT_WIDTH}


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyCase:
    """One tiny model: a model_type, what its config overrides, and the spread of its router's weights."""

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    router_std: float = 0.5  # decisive: near-ties would hide a wrong choice


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
    "granitemoe_swa": FamilyCase(model_type="granitemoe_swa", config=_EXPERT_WIDTH | {"shared_intermediate_size": 40}),
    "granitemoeshared": FamilyCase(
        model_type="granitemoeshared", config=_EXPERT_WIDTH | {"shared_intermediate_size": 40}
    ),
    "granitemoehybrid": FamilyCase(
        model_type="granitemoehybrid",
        config=_EXPERT_WIDTH
        | {"shared_intermediate_size": 40, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16},
    ),
}


def tiny_config(case: FamilyCase) -> PreTrainedConfig:
    """The case's config: the family's own, with tiny sizes and the case's overrides."""
    return _shrink(AutoConfig.for_model(case.model_type), TEXT, case.config)


def _shrink(default: PreTrainedConfig, sizes: dict[str, Any], overrides: dict[str, Any]) -> PreTrainedConfig:
    config_class = type(default)
    known = {f.name for f in dataclasses.fields(config_class)}
    if sizes is TEXT and known & {"n_group", "num_expert_group"}:
        sizes = sizes | _GROUPED
    values = {key: value for key, value in sizes.items() if key in known}
    if "kv_lora_rank" in known:
        values["num_key_value_heads"] = values["num_attention_heads"]  # latent attention has no groups
    nested = {key: getattr(default, key, None) for key in config_class.sub_configs}
    for key, value in nested.items():
        if isinstance(value, PreTrainedConfig):
            tower = TEXT if key in ("text_config", "thinker_config", "talker_config") else VISION
            values[key] = _shrink(value, tower, overrides.get(key, {})).to_dict()
    return config_class(
        **values | {key: value for key, value in overrides.items() if key not in values.keys() & nested}
    )
