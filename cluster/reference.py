"""The oracle: a model's own code in transformers, loaded on this machine's CPU, and its MoE blocks by layer name."""

from pathlib import Path

import torch
from torch import nn

from protos.errors import UnsupportedModel


def load_reference(path: Path) -> nn.Module:
    """The model as transformers loads it, with the plain (eager) experts of its modeling code.

    Raises:
        UnsupportedModel: transformers cannot load it.
    """
    import transformers  # slow to import

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", experts_implementation="eager", local_files_only=True
        )
    except Exception as err:
        raise UnsupportedModel(f"model {path}: transformers cannot load it: {err}") from err
    model.requires_grad_(False)
    model.eval()
    return model


def moe_block(model: nn.Module, layer: str) -> nn.Module:
    """The MoE block of transformer layer `layer`: takes [1, T, D], returns [1, T, D] (or a tuple that begins with it).

    Raises:
        UnsupportedModel: the layer has no submodule with experts.
    """
    prefix = f"model.layers.{layer}."
    for name, module in model.named_modules():
        direct = name.startswith(prefix) and name.count(".") == prefix.count(".")
        if direct and any(child == "experts" for child, _ in module.named_children()):
            return model.get_submodule(name)
    raise UnsupportedModel(f"layer {layer}: transformers' {type(model).__name__} has no MoE block there")


@torch.inference_mode()
def run_block(block: nn.Module, x_TD: torch.Tensor) -> torch.Tensor:
    """The block's output [T, D]."""
    y = block(x_TD.unsqueeze(0))
    y_1TD: torch.Tensor = y[0] if isinstance(y, tuple) else y
    return y_1TD.reshape(x_TD.shape)
