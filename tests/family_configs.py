"""Tiny configs: a family's own config class with small sizes and a case's overrides.

D=64, expert width 48, 8 experts (16 in 4 groups where the family knows groups), 3 layers, the first one dense where the
family can. Options that change the result sit at values where they do: limits bite, scales differ from 1. No two of D,
expert width and its double are equal: a transposed matrix shows in its shape.
"""

import dataclasses
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
    "share_expert_dim": 40,
    "shared_intermediate_size": 40,
    "shared_experts_intermediate_size": 40,
    "route_scale": 1.5,
    "router_scaling_factor": 1.5,
    "moe_router_scaling_factor": 1.5,
    "moe_routed_scaling_factor": 1.5,
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
    "text_hidden_size": DIM,
    "output_channels": 8,
    "downsample_channels": [8, 8],
    "mlp_dim": 32,
    "image_size": 64,
    "vision_output_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "moe_intermediate_size": EXPERT_WIDTH,
    "per_layer_config": {},
    "mlp_layer_types": ["dense"],
}


def tiny_config(model_type: str, overrides: dict[str, Any]) -> PreTrainedConfig:
    """A config of `model_type`: TEXT, and VISION for the other towers of a composite, wherever its class has the key.

    Args:
        model_type: as in config.json.
        overrides: keys of the case, nested as in config.json; they win.
    """
    return _shrink(AutoConfig.for_model(model_type), TEXT, overrides)


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
