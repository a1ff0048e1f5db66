"""The MoE blocks inside a transformers model, and how to ask them for output and routing.

A layer's name is its index in the model ("0", "1", ...); models with two towers that hold MoE layers prefix the tower
("encoder.1", "talker.0"). The routing is read where it is used, from the arguments with which the block calls its
experts: a factor that the block applies to the routed sum afterwards is not part of it (beam, laguna, minimax_m3_vl,
step3p7, nllb_moe's 1 - moe_token_dropout, openai_privacy_filter's x top_k).
"""

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_INDEX = re.compile(r"\.(?:layers|block|blocks)\.(\d+)\.")
_TOWERS = ("encoder", "decoder", "talker", "thinker", "vision_tower")

Run = tuple[Tensor, Tensor, Tensor]
"""Output [T, D], experts [T, K] (int64; -1: dropped), weights [T, K] of one call."""


class GemmaMoE(nn.Module):
    """The MoE half of a Gemma decoder layer, which has no block class: `experts(x, *router(x))`.

    In the layer the router reads the residual, the experts read pre_feedforward_layernorm_2 of it, and
    post_feedforward_layernorm_2 of their sum joins a dense MLP that runs beside them; here both read the same x, and
    neither norms nor dense MLP take part.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.router, self.experts = layer.router, layer.experts

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
        _, weight_TK, expert_TK = self.router(x_TD)
        output: Tensor = self.experts(x_TD, expert_TK, weight_TK)
        return output


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The MoE blocks of `model` by layer name, in the model's order; of tied ones the first."""
    paths: list[str] = []
    weights: set[int] = set()
    for path, module in model.named_modules():
        nested = any(path.startswith(f"{outer}.") for outer in paths)
        if _is_block(module) and not nested and id(first := next(module.parameters())) not in weights:
            paths.append(path)
            weights.add(id(first))
    towers = {_tower(path) for path in paths}
    found: dict[str, nn.Module] = {}
    for path in paths:
        match = _INDEX.search(f"{path}.")
        assert match is not None, path
        tower = f"{_tower(path)}." if len(towers) > 1 and _tower(path) else ""
        name = tower + match.group(1)
        assert name not in found, f"{path}: a second block of layer {name}"
        block = model.get_submodule(path)
        found[name] = GemmaMoE(block) if hasattr(block, "self_attn") else block
    return found


@torch.no_grad()
def run_block(block: nn.Module, x_TD: Tensor, token_ids_T: Tensor | None) -> Run:
    """Run one block on x_TD [T, D]; token ids [T] reach those blocks that ask for them."""
    return _SPECIAL.get(type(block).__name__, _run)(block, x_TD, token_ids_T)


def _is_block(module: nn.Module) -> bool:
    if type(module).__name__ == "JetMoeMoE" or hasattr(module, "text_moe"):
        return True
    return hasattr(module, "experts") and (hasattr(module, "gate") or hasattr(module, "router"))


def _tower(path: str) -> str:
    return next((part for part in path.split(".") if part in _TOWERS), "")


def _run(block: nn.Module, x_TD: Tensor, token_ids_T: Tensor | None, experts: nn.Module | None = None) -> Run:
    experts = experts or block.get_submodule("experts")
    signature = inspect.signature(type(experts).forward)
    calls: list[list[Any]] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(list(signature.bind(module, *args, **kwargs).arguments.values()))

    extra: dict[str, Tensor] = {}
    if token_ids_T is not None and "input_ids" in inspect.signature(type(block).forward).parameters:
        extra["input_ids"] = token_ids_T[None]
    hook = experts.register_forward_pre_hook(record, with_kwargs=True)
    try:
        output = block(x_TD[None], **extra)
    finally:
        hook.remove()
    ((_, _, expert_TK, weight_TK),) = calls
    output = output[0] if isinstance(output, tuple) else output
    return output.reshape(x_TD.shape), expert_TK.long(), weight_TK


def _run_ernie_vl(block: nn.Module, x_TD: Tensor, _: Tensor | None) -> Run:
    """Text tokens only: each goes to the text experts and the shared ones."""
    return _run(block, x_TD, None, block.get_submodule("text_moe.experts"))


def _run_llama4(block: Any, x_TD: Tensor, _: Tensor | None) -> Run:
    """The weights multiply the experts' INPUT."""
    score_TE, _ = block.router(x_TD)
    weight_TK, expert_TK = score_TE.topk(block.top_k, dim=-1)
    return block(x_TD[None])[0], expert_TK, weight_TK


def _run_jetmoe(block: Any, x_TD: Tensor, _: Tensor | None) -> Run:
    """Its router returns the pairs sorted by expert: the order of the sort gives each pair its token and expert."""
    sorted_N, _, weight_N, expert_size, _ = block.router(x_TD)
    expert_N, weight_by_slot_N = torch.empty_like(sorted_N), torch.empty_like(weight_N)
    expert_N[sorted_N] = torch.arange(len(expert_size)).repeat_interleave(torch.tensor(expert_size))
    weight_by_slot_N[sorted_N] = weight_N
    shape = (x_TD.shape[0], block.router.top_k)
    return block(x_TD[None])[0], expert_N.view(shape), weight_by_slot_N.view(shape)


def _run_switch(block: nn.Module, x_TD: Tensor, _: Tensor | None) -> Run:
    """x_TD is one sequence; a token beyond its expert's capacity is dropped: expert -1, weight 0."""
    output_TD, mask_TKE, weight_TK = _run(block, x_TD, None)
    kept_TK = mask_TKE.any(dim=-1)
    return output_TD, mask_TKE.argmax(dim=-1).where(kept_TK, torch.tensor(-1)), weight_TK * kept_TK


def _run_nllb(block: Any, x_TD: Tensor, _: Tensor | None) -> Run:
    """The sum NLLB-MoE defines: over a token's kept experts, probability x expert(x), times 1 - moe_token_dropout.

    Router and experts are the block's own. The block's forward in transformers 5.23 adds something else: it hands the
    first choice's one-hot mask to the experts as if it held expert ids. The second kept expert may be none (-1, 0).
    """
    _, probability_TE, _ = block.router(x_TD)
    output_TD = torch.zeros_like(x_TD)
    for expert in range(block.num_experts):
        (token_N,) = torch.where(probability_TE[:, expert] > 0)
        part_ND = block.experts[f"expert_{expert}"](x_TD[token_N]) * probability_TE[token_N, expert, None]
        output_TD.index_add_(0, token_N, (part_ND * (1 - block.experts.moe_token_dropout)).to(output_TD.dtype))
    weight_TK, expert_TK = probability_TE.topk(2, dim=-1)
    return output_TD, expert_TK.where(weight_TK > 0, torch.tensor(-1)), weight_TK


_SPECIAL: dict[str, Callable[[Any, Tensor, Tensor | None], Run]] = {
    "Ernie4_5_VLMoeMoeBlock": _run_ernie_vl,
    "Llama4TextMoe": _run_llama4,
    "JetMoeMoE": _run_jetmoe,
    "SwitchTransformersSparseMLP": _run_switch,
    "NllbMoeSparseMLP": _run_nllb,
}
