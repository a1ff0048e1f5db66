"""Exact top-k gating: hidden states in, chosen experts and their weights out, as the model's own block computes them.

The operations and their order are those of transformers 5.23, family by family, so that the choice and the weights
are equal to the last bit; a `GateSpec` says which of them apply. Top-k gating: arXiv:1701.06538; selection bias and
group-limited selection: DeepSeek-V3, arXiv:2412.19437.

Shapes: T tokens, D model dim, E experts, K top-k, G expert groups.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from protos.checkpoint import GateWeights
from protos.model import GateSpec, GroupLimit


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routing:
    """Which experts each token goes to, with which weight.

    score_TE is what weights are made of; choice_TE is what selection ranks by (bias added, excluded groups -inf).
    Both are None where the caller did not ask for them, or where a request brought its own routing.
    """

    expert_TK: npt.NDArray[np.int32]
    weight_TK: npt.NDArray[np.float32]
    score_TE: npt.NDArray[np.float32] | None = None
    choice_TE: npt.NDArray[np.float32] | None = None

    @property
    def top_k(self) -> int:
        """K, the experts per token."""
        return int(self.expert_TK.shape[1])


class Gate:
    """The gate of one layer.

    Args:
        spec: the family's gating options.
        weights: the layer's router weight, and its selection bias where the spec says so.
    """

    def __init__(self, spec: GateSpec, weights: GateWeights) -> None:
        self._spec = spec
        weight_ED = weights.weight_ED
        self._model_dtype = weight_ED.dtype
        self._weight_ED = (weight_ED.float() if spec.logits_dtype == "float32" else weight_ED).contiguous()
        self._bias_E = weights.bias_E.float() if spec.selection_bias and weights.bias_E is not None else None
        assert (self._bias_E is not None) == spec.selection_bias, (
            "the checkpoint reader delivers what the spec asks for"
        )

    def __call__(self, x_TD: Tensor, *, with_scores: bool = False) -> Routing:
        """Route every token.

        Args:
            x_TD: hidden states as the block receives them; another dtype than the model's is cast to it.
            with_scores: also return score_TE and choice_TE, which only the overflow step `next_expert` needs.
        """
        score_TE = self._scores(x_TD)
        choice_TE = self._choices(score_TE)
        # The families with a selection bias ask for the chosen in no particular order. The set is the same either
        # way, but the order decides how the sum below is rounded.
        value_TK, index_TK = torch.topk(choice_TE, self._spec.top_k, dim=-1, sorted=self._bias_E is None)
        if choice_TE is not score_TE:
            value_TK = score_TE.gather(1, index_TK)
        return Routing(
            expert_TK=index_TK.numpy().astype(np.int32),
            weight_TK=self._weights(value_TK).numpy(),
            score_TE=score_TE.numpy() if with_scores else None,
            choice_TE=choice_TE.numpy() if with_scores else None,
        )

    def weigh(self, score_TE: npt.NDArray[np.float32], expert_TK: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """The weights this gate would give another set of experts, for example after overflow replaced some.

        Args:
            score_TE: scores of a `Routing`.
            expert_TK: the set; -1 stands for no expert and gets weight 0.
        """
        index_TK = torch.from_numpy(expert_TK.astype(np.int64))
        chosen_TK = torch.from_numpy(score_TE).gather(1, index_TK.clamp(min=0)).masked_fill_(index_TK < 0, 0.0)
        # An empty set has the sum 0: its weights are 0, not 0/0.
        return self._weights(chosen_TK).nan_to_num_(nan=0.0).numpy()

    def _scores(self, x_TD: Tensor) -> Tensor:
        if x_TD.dtype is not self._model_dtype:
            x_TD = x_TD.to(self._model_dtype)
        if self._spec.logits_dtype == "float32":
            x_TD = x_TD.float()
        logits_TE = F.linear(x_TD, self._weight_ED)
        if self._spec.score == "softmax":
            return torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
        return logits_TE.float().sigmoid()

    def _choices(self, score_TE: Tensor) -> Tensor:
        choice_TE = score_TE if self._bias_E is None else score_TE + self._bias_E
        groups = self._spec.groups
        return choice_TE if groups is None else _mask_groups(choice_TE, groups)

    def _weights(self, value_TK: Tensor) -> Tensor:
        """From the scores of the chosen experts to their weights, fp32. `value_TK` may be overwritten."""
        spec = self._spec
        if spec.renorm == "sum":
            sum_T1 = value_TK.sum(dim=-1, keepdim=True)
            value_TK /= sum_T1 + spec.renorm_eps if spec.renorm_eps else sum_T1
        if spec.scale != 1.0:
            value_TK = value_TK * spec.scale
        if spec.weight_dtype == "model" and self._model_dtype is not torch.float32:
            value_TK = value_TK.to(self._model_dtype).float()
        return value_TK


def _mask_groups(choice_TE: Tensor, groups: GroupLimit) -> Tensor:
    """-inf for every expert outside the best groups; a group scores the sum of its two best choices."""
    choice_TGe = choice_TE.view(len(choice_TE), groups.num_groups, -1)
    score_TG = choice_TGe.topk(2, dim=-1)[0].sum(dim=-1)
    best = torch.topk(score_TG, groups.top_groups, dim=-1, sorted=False)[1]
    excluded_TG = torch.ones_like(score_TG, dtype=torch.bool).scatter_(1, best, value=False)
    return choice_TGe.masked_fill(excluded_TG.unsqueeze(-1), float("-inf")).flatten(1)
