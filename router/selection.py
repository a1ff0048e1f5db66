"""Selections that are more than a top-k: groups, sparsemixer, and capacities that belong to the model itself.

Shapes: T tokens, E choices, K top-k, G expert groups, R tokens of one request.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from protos.model import GroupLimit, OwnCapacity


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


def capacity_choice(probability_TE: Tensor, top_k: int, dtype: torch.dtype) -> Tensor:
    """The experts [T, K] a gate with a capacity of its own asks for: K is 1 or 2.

    The first choice is the first of the highest probabilities after they were rounded to the model dtype, in which
    bf16 makes many equal; the second is the highest of the others before rounding (transformers, both Switch and NLLB).
    """
    first_T1 = probability_TE.to(dtype).argmax(dim=-1, keepdim=True)
    if top_k == 1:
        return first_T1
    rest_TE = probability_TE.scatter(-1, first_T1, float("-inf"))
    return torch.cat((first_T1, rest_TE.argmax(dim=-1, keepdim=True)), dim=-1)


def limit_capacity(
    probability_TE: Tensor, index_TK: Tensor, capacity: OwnCapacity, offsets: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Weights and experts after the model's own capacity; left-out choices become expert -1 with weight 0.

    Args:
        probability_TE: of all experts, in the model dtype.
        index_TK: the chosen experts, the first choice first.
        capacity: how many places there are, and who gets them.
        offsets: first rows of the requests, and the end: a capacity sees one request at a time.
    """
    kept_TK = torch.ones_like(index_TK, dtype=torch.bool)
    for first, end in pairwise(offsets):
        kept_TK[first:end] = _within_capacity(probability_TE[first:end], index_TK[first:end], capacity)
    return capacity_weights(probability_TE, index_TK, kept_TK, capacity), index_TK.masked_fill(~kept_TK, -1)


def capacity_weights(probability_TE: Tensor, index_TK: Tensor, kept_TK: Tensor, capacity: OwnCapacity) -> Tensor:
    """Weights of the kept choices: their probabilities, in NLLB normalised over both choices or over the kept ones.

    Args:
        probability_TE: of all experts, in the model dtype.
        index_TK: the chosen experts; anything where not kept.
        kept_TK: which of them found a place.
        capacity: says how to normalise.
    """
    value_TK = probability_TE.gather(-1, index_TK) * kept_TK
    if capacity.kind == "sequence":
        return value_TK
    mass_TK = value_TK
    if capacity.normalise_before:  # a choice without a place counts with the best expert that is not in the set
        taken_TE = torch.zeros_like(probability_TE).scatter_add_(-1, index_TK, kept_TK.to(probability_TE.dtype))
        mass_TK = torch.where(kept_TK, value_TK, probability_TE.masked_fill(taken_TE > 0, 0.0).amax(-1, keepdim=True))
    return value_TK / mass_TK.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(value_TK.dtype).eps)


def _within_capacity(probability_RE: Tensor, index_RK: Tensor, capacity: OwnCapacity) -> Tensor:
    """Which choices of one request find a place: the first choices of all tokens, then the second ones."""
    num_tokens, num_experts = probability_RE.shape
    places = capacity.capacity
    if capacity.kind == "batch":
        if capacity.token_fraction > 0:
            places = math.ceil(capacity.token_fraction * num_tokens)
        elif places is None:
            places = 2 * math.ceil(num_tokens / num_experts)
    assert places is not None, "the config reader demands a capacity"
    order_R = torch.arange(num_tokens)
    if capacity.by_priority:
        order_R = (-probability_RE.amax(dim=-1)).argsort()  # as transformers sorts: ties fall as they fall there
    kept_RK = torch.zeros_like(index_RK, dtype=torch.bool)
    used_E = torch.zeros(num_experts, dtype=torch.int64)
    for k in range(index_RK.shape[1]):
        asked_RE = torch.nn.functional.one_hot(index_RK[order_R, k], num_experts)
        place_R = ((asked_RE.cumsum(dim=0) - 1 + used_E) * asked_RE).sum(dim=-1)
        kept_RK[order_R, k] = place_R < places
        used_E = used_E + asked_RE.sum(dim=0)
    return kept_RK
