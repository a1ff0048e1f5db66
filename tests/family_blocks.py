"""The MoE blocks inside a transformers model, and how to ask them for output and routing.

A layer's name is its index in the model ("0", "1", ...); models with two towers that hold MoE layers prefix the tower
("encoder.1", "talker.0"). The routing is read where it is used: from the arguments with which the block calls its
experts, so any scale applied to the routed sum afterwards is not part of it (beam, laguna, minimax_m3_vl, step3p7,
openai_privacy_filter's x top_k).
"""

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn

_INDEX = re.compile(r"\.(?:layers|block|blocks)\.(\d+)\.")


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The MoE blocks of `model` by layer name, in the model's order."""
    found: dict[str, nn.Module] = {}
    paths = [path for path, module in model.named_modules() if _is_block(module)]
    towers = {_tower(path) for path in paths}
    for path in paths:
        match = _INDEX.search(path + ".")
        assert match is not None, path
        name = match.group(1) if len(towers) == 1 else f"{_tower(path)}.{match.group(1)}"
        assert name not in found, f"{path}: a second block of layer {name}"
        found[name] = model.get_submodule(path)
    return found


def _is_block(module: nn.Module) -> bool:
    return hasattr(module, "experts") and (hasattr(module, "gate") or hasattr(module, "router"))


def _tower(path: str) -> str:
    parts = path.split(".")
    return next((part for part in parts if part in ("encoder", "decoder", "talker", "thinker")), "")


@torch.no_grad()
def run_block(block: nn.Module, x_TD: Tensor, token_ids_T: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Output [T, D], experts [T, K] and weights [T, K] of a block that calls `experts(x, experts, weights)`."""
    seen: list[dict[str, Any]] = []
    experts: Any = block.experts
    signature = inspect.signature(type(experts).forward)

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(signature.bind(module, *args, **kwargs).arguments)

    hook = experts.register_forward_pre_hook(record, with_kwargs=True)
    try:
        extra: dict[str, Tensor] = {}
        if token_ids_T is not None and "input_ids" in inspect.signature(type(block).forward).parameters:
            extra["input_ids"] = token_ids_T[None]
        output = block(x_TD[None], **extra)
    finally:
        hook.remove()
    output = output[0] if isinstance(output, tuple) else output
    (call,) = seen
    _, _, expert_TK, weight_TK = call.values()
    return output.reshape(x_TD.shape), expert_TK.long(), weight_TK
