"""Selections that are more than a top-k: groups, sparsemixer, and capacities that belong to the model itself.

Shapes: T tokens, E choices, K top-k, G expert groups, R tokens of one request.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from protos.model import GateSpec, GroupLimit, OwnCapacity


def mask_groups(choice_TE: Tensor, groups: GroupLimit) -> Tensor:
    """Mask every expert outside the best groups (DeepSeek-V2 arXiv:2405.04434, DeepSeek-V3 arXiv:2412.19437)."""
    choice_TGe = choice_TE.view(len(choice_TE), groups.num_groups, -1)
    if groups.score == "max":
        score_TG = choice_TGe.max(dim=-1).values
    else:
        score_TG = choice_TGe.topk(2, dim=-1)[0].sum(dim=-1)
    best = torch.topk(score_TG, groups.top_groups, dim=-1, sorted=False)[1]
    excluded_TG = torch.ones_like(score_TG, dtype=torch.bool).scatter_(1, best, value=False)
    nothing = float("-inf") if groups.excluded == "-inf" else 0.0
    return choice_TGe.masked_fill(excluded_TG.unsqueeze(-1), nothing).flatten(1)


def sparsemixer(logits_TE: Tensor, top_k: int, jitter: float) -> tuple[Tensor, Tensor]:
    """Weights and experts [T, K] of SparseMixer-v2 at inference (arXiv:2409.12136): no noise, one expert at a time."""
    left_TE = logits_TE
    indices = []
    for _ in range(top_k):
        best_T1 = left_TE.argmax(dim=-1, keepdim=True)
        indices.append(best_T1)
        left_TE = left_TE.scatter(-1, best_T1, float("-inf"))
    index_TK = torch.cat(indices, dim=-1)
    return sparsemixer_weights(logits_TE, index_TK, jitter), index_TK


def sparsemixer_weights(logits_TE: Tensor, index_TK: Tensor, jitter: float) -> Tensor:
    """The weight of each choice: softmax over what the earlier choices left and the margin below the best allows.

    The margin is relative to the larger of the best logit left and the logit's own absolute value, and the logits it
    compares are the original ones.
    """
    weights = []
    left_TE = logits_TE
    for k in range(index_TK.shape[1]):
        index_T1 = index_TK[:, k : k + 1]
        best_T1 = left_TE.gather(-1, index_T1)
        factor_TE = torch.maximum(logits_TE.abs(), best_T1)
        far_TE = (best_T1 - logits_TE) / factor_TE > 2 * jitter
        probability_TE = torch.softmax(left_TE.masked_fill(far_TE, float("-inf")), dim=-1)
        weights.append(probability_TE.gather(-1, index_T1))
        left_TE = left_TE.scatter(-1, index_T1, float("-inf"))
    return torch.cat(weights, dim=-1)


def limit_capacity(value_TK: Tensor, index_TK: Tensor, spec: GateSpec, offsets: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Weights and experts after the model's own capacity; left-out choices become expert -1 with weight 0.

    Args:
        value_TK: probabilities of the chosen experts, the best first, in the model dtype.
        index_TK: the chosen experts.
        spec: with `capacity` set.
        offsets: first rows of the requests, and the end: a capacity sees one request at a time.
    """
    assert spec.capacity is not None, "the caller asks for families with a capacity only"
    kept_TK = torch.ones_like(index_TK, dtype=torch.bool)
    for first, end in pairwise(offsets):
        kept_TK[first:end] = _within_capacity(value_TK[first:end], index_TK[first:end], spec, spec.capacity)
    if spec.capacity.kind == "batch":  # NLLB normalises over both choices, before or after the dropping
        mass_TK = value_TK if spec.capacity.normalise_before else value_TK * kept_TK
        value_TK = mass_TK / mass_TK.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(value_TK.dtype).eps)
    return value_TK * kept_TK, index_TK.masked_fill(~kept_TK, -1)


def _within_capacity(value_RK: Tensor, index_RK: Tensor, spec: GateSpec, capacity: OwnCapacity) -> Tensor:
    """Which choices of one request find a place: the first choices of all tokens, then the second ones."""
    num_tokens = len(index_RK)
    places = capacity.capacity
    if capacity.kind == "batch":
        if capacity.token_fraction > 0:
            places = math.ceil(capacity.token_fraction * num_tokens)
        elif places is None:
            places = 2 * math.ceil(num_tokens / spec.num_experts)
    assert places is not None, "the config reader demands a capacity"
    order_R = torch.arange(num_tokens)
    if capacity.by_priority:
        order_R = value_RK[:, 0].argsort(descending=True, stable=True)
    kept_RK = torch.zeros_like(index_RK, dtype=torch.bool)
    used_E = torch.zeros(spec.num_experts, dtype=torch.int64)
    for k in range(index_RK.shape[1]):
        asked_RE = torch.nn.functional.one_hot(index_RK[order_R, k], spec.num_experts)
        place_R = ((asked_RE.cumsum(dim=0) - 1 + used_E) * asked_RE).sum(dim=-1)
        kept_RK[order_R, k] = place_R < places
        used_E = used_E + asked_RE.sum(dim=0)
    return kept_RK
