"""Exact top-k gating: hidden states in, chosen experts and their weights out, as the model's own block computes them.

The operations and their order are those of transformers 5.23, family by family, so that the choice and the weights
are equal to the last bit; a `GateSpec` says which of them apply. Top-k gating: arXiv:1701.06538; selection bias and
group-limited selection: DeepSeek-V3, arXiv:2412.19437. Selections that are no top-k are in `selection.py`.

Shapes: T tokens, D model dim, E choices (routed experts, then identity experts), K top-k, G expert groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from protos.checkpoint import GateWeights
from protos.errors import InvalidRequest
from protos.model import GateSpec
from router.selection import (
    capacity_choice,
    capacity_weights,
    limit_capacity,
    mask_groups,
    sparsemixer,
    sparsemixer_weights,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routing:
    """Which experts each token goes to, with which weight.

    expert_TK: -1 where the model's own capacity leaves a choice out (weight 0), ids from num_experts on are identity
    experts. score_TE is what weights are made of; choice_TE is what selection ranks by (bias added, excluded groups
    masked). Both are None where the caller did not ask for them, or where a request brought its own routing.
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
        weights: the layer's router weight, and whatever else the spec asks for.
    """

    def __init__(self, spec: GateSpec, weights: GateWeights) -> None:
        self.spec = spec
        weight_ED = weights.weight_ED
        self._model_dtype = weights.dtype or weight_ED.dtype
        in_fp32 = spec.logits_dtype == "float32"
        self._weight_ED = (weight_ED.float() if in_fp32 else weight_ED).contiguous()
        self._bias_E = weights.bias_E.float() if spec.selection_bias and weights.bias_E is not None else None
        self._logit_bias_E = (
            weights.logit_bias_E.to(self._weight_ED.dtype) if weights.logit_bias_E is not None else None
        )
        self._input_scale_D = weights.input_scale_D
        self._expert_scale_E = weights.expert_scale_E
        self._table_VK = weights.table_VK
        self._score_dtype = torch.float32 if spec.score_dtype == "float32" else self._model_dtype
        for is_there, wanted in (
            (self._bias_E is not None, spec.selection_bias),
            (self._logit_bias_E is not None, spec.logit_bias),
            (self._input_scale_D is not None, spec.input_norm_eps is not None),
            (self._expert_scale_E is not None, spec.per_expert_scale),
            (self._table_VK is not None, spec.needs_token_ids),
        ):
            assert is_there == wanted, "the checkpoint reader delivers what the spec asks for"

    def __call__(
        self,
        x_TD: Tensor,
        *,
        with_scores: bool = False,
        token_ids_T: npt.NDArray[np.int64] | None = None,
        offsets: Sequence[int] | None = None,
    ) -> Routing:
        """Route every token.

        Args:
            x_TD: hidden states as the block receives them; another dtype than the model's is cast to it.
            with_scores: also return score_TE and choice_TE, which only the overflow step `next_expert` needs.
            token_ids_T: of the tokens, for gates that look experts up.
            offsets: first rows of the requests in x_TD and the end, for gates with a capacity of their own, which
                sees each request by itself; None for a single one.

        Raises:
            InvalidRequest: token ids are missing or not in the table.
        """
        spec = self.spec
        score_TE = self._scores(x_TD)
        choice_TE = score_TE if self._bias_E is None else score_TE + self._bias_E
        if spec.groups is not None:
            choice_TE = mask_groups(choice_TE, spec.groups)
        if spec.selection == "sparsemixer":
            weight_TK, index_TK = sparsemixer(score_TE, spec.top_k, spec.jitter)
            weight_TK = weight_TK.float()
        elif spec.selection == "hash":
            index_TK = self._look_up(token_ids_T, len(x_TD))
            weight_TK = self._weights(score_TE.gather(1, index_TK), index_TK)
        elif spec.capacity is not None:
            index_TK = capacity_choice(score_TE, spec.top_k, self._model_dtype)
            score_TE = score_TE.to(self._model_dtype)  # which is what weights are made of
            weight_TK, index_TK = limit_capacity(score_TE, index_TK, spec.capacity, offsets or [0, len(x_TD)])
        else:
            # The families with a selection bias ask for the chosen in no particular order. The set is the same either
            # way, but the order decides how the sum below is rounded.
            value_TK, index_TK = torch.topk(choice_TE, spec.top_k, dim=-1, sorted=self._bias_E is None)
            if choice_TE is not score_TE:
                value_TK = score_TE.gather(1, index_TK)
            weight_TK = self._weights(value_TK, index_TK)
        return Routing(
            expert_TK=index_TK.numpy().astype(np.int32),
            weight_TK=weight_TK.float().numpy(),
            score_TE=score_TE.float().numpy() if with_scores else None,
            choice_TE=choice_TE.float().numpy() if with_scores else None,
        )

    def weigh(self, score_TE: npt.NDArray[np.float32], expert_TK: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """The weights this gate would give another set of experts, for example after overflow replaced some.

        Args:
            score_TE: scores of a `Routing`.
            expert_TK: the set; -1 stands for no expert and gets weight 0.
        """
        index_TK = torch.from_numpy(expert_TK.astype(np.int64))
        scores_TE = torch.from_numpy(score_TE).to(self._score_dtype)
        absent_TK = index_TK < 0
        index_TK = index_TK.clamp(min=0)
        if self.spec.selection == "sparsemixer":
            weight_TK = sparsemixer_weights(scores_TE, index_TK, self.spec.jitter).masked_fill_(absent_TK, 0.0)
            return weight_TK.float().numpy()
        if self.spec.capacity is not None:
            return (
                capacity_weights(scores_TE.to(self._model_dtype), index_TK, ~absent_TK, self.spec.capacity)
                .float()
                .numpy()
            )
        # Functions of the chosen logits see an absent one as minus infinity: probability 0.
        nothing = float("-inf") if self.spec.chosen != "score" else 0.0
        chosen_TK = scores_TE.gather(1, index_TK).masked_fill_(absent_TK, nothing)
        # An empty set has the sum 0: its weights are 0, not 0/0.
        return self._weights(chosen_TK, index_TK).nan_to_num_(nan=0.0).float().numpy()

    def _scores(self, x_TD: Tensor) -> Tensor:
        spec = self.spec
        if x_TD.dtype is not self._model_dtype:
            x_TD = x_TD.to(self._model_dtype)
        if self._input_scale_D is not None:
            assert spec.input_norm_eps is not None, "checked with the weights"
            mean_T1 = x_TD.float().pow(2).mean(-1, keepdim=True) + spec.input_norm_eps
            x_TD = (x_TD.float() * torch.pow(mean_T1, -0.5)).to(x_TD.dtype)
            x_TD = x_TD * self._input_scale_D * x_TD.shape[-1] ** -0.5
        if x_TD.dtype is not self._weight_ED.dtype:
            x_TD = x_TD.to(self._weight_ED.dtype)
        logits_TE = F.linear(x_TD, self._weight_ED, self._logit_bias_E)
        dtype = self._score_dtype
        if spec.logit_softcap is not None:
            logits_TE = torch.tanh(logits_TE.to(dtype) / spec.logit_softcap) * spec.logit_softcap
        if spec.score == "softmax":
            return torch.softmax(logits_TE, dim=-1, dtype=dtype)
        logits_TE = logits_TE.to(dtype)
        if spec.score == "sigmoid":
            return logits_TE.sigmoid()
        return F.softplus(logits_TE).sqrt() if spec.score == "sqrt_softplus" else logits_TE

    def check_token_ids(self, token_ids_T: npt.NDArray[np.int64] | None, num_tokens: int) -> None:
        """Whether a gate that looks experts up can do so.

        Raises:
            InvalidRequest: the ids are missing, too few or many, or not in the table.
        """
        assert self._table_VK is not None, "only asked of gates with a table"
        if token_ids_T is None or len(token_ids_T) != num_tokens:
            found = "none" if token_ids_T is None else len(token_ids_T)
            raise InvalidRequest(f"token_ids: {found} for {num_tokens} tokens; this layer looks its experts up by them")
        limit = len(self._table_VK)
        if num_tokens and not 0 <= int(token_ids_T.min()) <= int(token_ids_T.max()) < limit:
            raise InvalidRequest(f"token_ids are {token_ids_T.min()}..{token_ids_T.max()}, limit is 0..{limit - 1}")

    def _look_up(self, token_ids_T: npt.NDArray[np.int64] | None, num_tokens: int) -> Tensor:
        self.check_token_ids(token_ids_T, num_tokens)
        assert self._table_VK is not None, "just checked"
        return self._table_VK[torch.tensor(token_ids_T)]  # a copy: what came over the wire is read-only

    def _weights(self, value_TK: Tensor, index_TK: Tensor) -> Tensor:
        """From the scores of the chosen experts to their weights, fp32. `value_TK` may be overwritten."""
        spec = self.spec
        if spec.chosen == "softmax":
            value_TK = torch.softmax(value_TK, dim=-1)
        elif spec.chosen == "sigmoid":
            value_TK = value_TK.sigmoid()
        if spec.renorm != "none":
            value_TK = value_TK / self._divisor(value_TK)
        if spec.scale != 1.0:
            value_TK = value_TK * spec.scale
        if spec.weight_dtype == "model" and self._model_dtype is not torch.float32:
            value_TK = value_TK.to(self._model_dtype).float()
        if self._expert_scale_E is not None:
            value_TK = value_TK * self._expert_scale_E[index_TK].to(value_TK.dtype)
        return value_TK.float()

    def _divisor(self, value_TK: Tensor) -> Tensor:
        spec = self.spec
        if spec.renorm == "norm":
            norm_T1: Tensor = torch.linalg.vector_norm(value_TK, ord=spec.renorm_p, dim=-1, keepdim=True)
            return norm_T1
        sum_T1 = value_TK.sum(dim=-1, keepdim=True)
        if spec.renorm == "clamp":
            return torch.clamp(sum_T1, min=spec.renorm_eps)
        return sum_T1 + spec.renorm_eps if spec.renorm_eps else sum_T1
