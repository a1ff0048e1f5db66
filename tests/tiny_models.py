"""Tiny random checkpoints of the supported families, written by transformers itself, and its MoE blocks as oracle.

D=64, F=32, E=8, K=2, 3 layers; DeepSeek-V3's first layer is dense.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3")
DIM, HIDDEN_DIM, NUM_EXPERTS, TOP_K = 64, 32, 8, 2

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": DIM,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_OWN: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": HIDDEN_DIM, "num_local_experts": NUM_EXPERTS},
    "qwen2_moe": {
        "intermediate_size": 96,
        "moe_intermediate_size": HIDDEN_DIM,
        "shared_expert_intermediate_size": 48,
        "num_experts": NUM_EXPERTS,
    },
    "qwen3_moe": {
        "intermediate_size": 96,
        "moe_intermediate_size": HIDDEN_DIM,
        "num_experts": NUM_EXPERTS,
        "norm_topk_prob": True,
        "head_dim": 16,
    },
    "olmoe": {"intermediate_size": HIDDEN_DIM, "num_experts": NUM_EXPERTS},
    "deepseek_v3": {
        "intermediate_size": 96,
        "moe_intermediate_size": HIDDEN_DIM,
        "n_routed_experts": NUM_EXPERTS,
        "n_shared_experts": 2,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
    },
}


def tiny_model(
    family: str, path: Path, *, dtype: str = "float32", seed: int = 0, sharded: bool = False, stacked: bool = False
) -> Path:
    """Write a tiny random checkpoint and return `path`.

    Args:
        family: one of FAMILIES.
        path: the directory to write; created if absent.
        dtype: of the weights: "float32", "bfloat16" or "float16"; the selection bias stays float32, as on the hub.
        seed: of the weights.
        sharded: several files and an index instead of one file.
        stacked: the layout of transformers' memory (experts.gate_up_proj) instead of per-expert tensors.
    """
    model = _random_model(family, dtype, seed)
    model.save_pretrained(path, max_shard_size="100KB" if sharded else "5GB", save_original_format=not stacked)
    return path


def load_reference(path: Path) -> nn.Module:
    """The checkpoint as transformers loads it, with the plain (eager) experts of its modeling code.

    Weights lie where torch allocates them, no longer as the file has them: on some processors the last bit of a
    one-token GEMM depends on how its weight is aligned.
    """
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype="auto", experts_implementation="eager"
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


def reference_block(model: nn.Module, layer: int | str) -> nn.Module:
    """The MoE block of one transformer layer: takes and returns [1, T, D]."""
    return model.get_submodule(f"model.layers.{layer}.mlp")


def _random_model(family: str, dtype: str, seed: int) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.for_model(family, **(_COMMON | _OWN[family]))
    model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "inv_freq" in name:
                continue
            if name.endswith(("norm.weight", "layernorm.weight")):
                tensor.fill_(1.0)
            elif name.endswith("e_score_correction_bias"):
                tensor.normal_(std=0.2, generator=generator)
            elif name.endswith("gate.weight"):
                tensor.normal_(std=0.5, generator=generator)  # decisive: near-ties would hide a wrong choice
            else:
                tensor.normal_(std=tensor.shape[-1] ** -0.5, generator=generator)
    model.to(getattr(torch, dtype))
    for name, tensor in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            tensor.data = tensor.data.float()
    return model
