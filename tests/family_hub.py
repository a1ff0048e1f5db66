"""What save_pretrained of transformers 5.23 writes otherwise than the hub has it, brought to the hub's form.

- qwen3_5_moe: the hub stacks the experts, save_pretrained splits them.
- qwen3_vl_moe: the hub stores [E, D, 2F] and [E, F, D], save_pretrained leaves them transposed. Its config, like
  qwen3_moe's, says num_experts.
- deepseek_v4: the hub has no `model.` prefix, and counts the hash layers in num_hash_layers.
- longcat_flash: the hub holds no matrices for identity experts, save_pretrained invents gate and up for them (and
  from_pretrained wants them: it cannot read this directory).
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor

Tensors = dict[str, Tensor]

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def to_hub(path: Path, model_type: str, *, max_shard_size: str) -> None:
    """Rewrite a directory of save_pretrained as the hub has it; a no-op for families where the two agree."""
    if edit_tensors := _TENSORS.get(model_type):
        files = sorted(path.glob("*.safetensors"))
        tensors: Tensors = {}
        for file in files:
            tensors |= load_file(file)
            file.unlink()
        (path / "model.safetensors.index.json").unlink(missing_ok=True)
        config = json.loads((path / "config.json").read_text())
        edited = {name: tensor.contiguous() for name, tensor in edit_tensors(tensors, config).items()}
        save_torch_state_dict(edited, path, max_shard_size=max_shard_size)
    if edit_config := _CONFIG.get(model_type):
        file = path / "config.json"
        file.write_text(json.dumps(edit_config(json.loads(file.read_text())), indent=2))


def _stack(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    stacks: dict[tuple[str, str], dict[int, Tensor]] = {}
    rest: Tensors = {}
    for name, tensor in tensors.items():
        if match := _EXPERT.fullmatch(name):
            stacks.setdefault((match[1], match[3]), {})[int(match[2])] = tensor
        else:
            rest[name] = tensor
    whole = {key: torch.stack([by_expert[i] for i in range(len(by_expert))]) for key, by_expert in stacks.items()}
    for prefix in {prefix for prefix, _ in whole}:
        rest[f"{prefix}.gate_up_proj"] = torch.cat((whole[prefix, "gate"], whole[prefix, "up"]), dim=1)
        rest[f"{prefix}.down_proj"] = whole[prefix, "down"]
    return rest


def _transpose(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    stacked = (".experts.gate_up_proj", ".experts.down_proj")
    return {name: tensor.transpose(1, 2) if name.endswith(stacked) else tensor for name, tensor in tensors.items()}


def _without_prefix(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def _without_identities(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    def real(name: str) -> bool:
        match = _EXPERT.fullmatch(name)
        return match is None or int(match[2]) < int(config["n_routed_experts"])

    return {name: tensor for name, tensor in tensors.items() if real(name)}


def _num_experts(config: dict[str, Any]) -> dict[str, Any]:
    text = config.get("text_config", config)
    text["num_experts"] = text.pop("num_local_experts")
    return config


def _num_hash_layers(config: dict[str, Any]) -> dict[str, Any]:
    config["num_hash_layers"] = config.pop("mlp_layer_types").count("hash_moe")
    return config


_TENSORS: dict[str, Callable[[Tensors, dict[str, Any]], Tensors]] = {
    "qwen3_5_moe": _stack,
    "qwen3_vl_moe": _transpose,
    "deepseek_v4": _without_prefix,
    "longcat_flash": _without_identities,
}
_CONFIG: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "qwen3_moe": _num_experts,
    "qwen3_vl_moe": _num_experts,
    "deepseek_v4": _num_hash_layers,
}
