"""Random weights of a MoE block that leave no option without effect.

Routers are decisive, selection biases shift choices, norms and scales are far from one, biases far from zero.
"""

import re

import torch
from torch import Tensor, nn

_SELECTION_BIAS = re.compile(r"correction_bias|expert_bias|router_bias|moe_statics")
_TRANSPOSED = ("Llama4TextExperts",)  # experts of shape [E, in, out] that carry no is_transposed mark


@torch.no_grad()
def randomise(block: nn.Module, *, router_std: float, generator: torch.Generator) -> None:
    """Draw every parameter and persistent buffer of one MoE block.

    Args:
        block: the module that holds router, experts and shared experts.
        router_std: standard deviation of the router's weight matrix.
        generator: source of all draws, so that a seed fixes the model.
    """
    for owner in block.modules():
        own = [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]
        for name, tensor in own:
            if name not in owner._non_persistent_buffers_set:
                _draw(block, owner, name, tensor, router_std, generator)


def _draw(
    block: nn.Module, owner: nn.Module, name: str, tensor: Tensor, router_std: float, generator: torch.Generator
) -> None:
    path = next(path for path, module in block.named_modules() if module is owner)
    full = f"{path}.{name}"
    if not tensor.is_floating_point():  # a table of expert ids by token id: K different experts in each row
        num_experts = int(owner.num_experts)  # type: ignore[arg-type]
        order = torch.rand(tensor.shape[0], num_experts, generator=generator).argsort(dim=-1)
        tensor.copy_(order[:, : tensor.shape[1]])
    elif _SELECTION_BIAS.search(full):
        tensor.normal_(std=0.2, generator=generator)
    elif name.endswith("bias"):
        tensor.normal_(std=0.3, generator=generator)
    elif tensor.dim() < 2:  # norm weights and scales
        tensor.uniform_(0.5, 1.5, generator=generator)
    elif {"gate", "router"} & set(full.split(".")):
        tensor.normal_(std=router_std, generator=generator)
    else:
        transposed = getattr(owner, "is_transposed", type(owner).__name__ in _TRANSPOSED)
        fan_in = tensor.shape[-2] if transposed else tensor.shape[-1]
        tensor.normal_(std=fan_in**-0.5, generator=generator)
