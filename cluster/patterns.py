"""Which experts synthetic traffic goes to: patterns as text, shares per expert, and routings drawn from them.

A token's K experts are distinct, and every expert gets exactly its share of the pairs in expectation: systematic
sampling (W. G. Madow, Annals of Mathematical Statistics 20, 1949), which no expert can enter twice as long as its
share is at most 1/K.

Shapes: T tokens, E experts, K experts per token.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from protos.errors import InvalidRequest
from router.gate import Routing

Shares = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """Where load goes. `trace`: hidden states recorded in `trace`, which the model's own gate routes."""

    kind: Literal["uniform", "zipf", "hot", "trace"]
    exponent: float = 0.0  # zipf: the r-th expert's share is proportional to r ** -exponent
    num_hot: int = 0  # hot: so many experts ...
    hot_share: float = 0.0  # ... get this share of all pairs
    trace: Path | None = None


def parse_pattern(text: str) -> Pattern:
    """Read `uniform`, `zipf:A`, `hot:N:SHARE` or `trace:FILE`.

    Raises:
        InvalidRequest: anything else; names the value and what is allowed.
    """
    kind, _, rest = text.partition(":")
    try:
        if kind == "uniform" and not rest:
            return Pattern(kind="uniform")
        if kind == "zipf" and 0 <= (exponent := float(rest)) <= 100:
            return Pattern(kind="zipf", exponent=exponent)
        if kind == "hot":
            num_hot, _, share = rest.partition(":")
            if int(num_hot) >= 1 and 0 <= float(share) <= 1:
                return Pattern(kind="hot", num_hot=int(num_hot), hot_share=float(share))
        if kind == "trace" and rest:
            return Pattern(kind="trace", trace=Path(rest))
    except ValueError:
        pass
    raise InvalidRequest(
        f"pattern {text!r} is none of uniform, zipf:A (A in 0..100), hot:N:SHARE (N >= 1, SHARE in 0..1), trace:FILE"
    )


def expert_shares(pattern: Pattern, *, num_experts: int, top_k: int) -> Shares:
    """Each expert's share of the pairs [E], the hottest first; none above 1/K, since a token takes an expert once.

    A Zipf head above 1/K is cut there, and what is cut goes to the others in proportion.

    Raises:
        InvalidRequest: the hot experts cannot take that share, or there are not so many.
    """
    if pattern.kind == "zipf":
        rank_E = np.arange(1, num_experts + 1, dtype=np.float64)
        return _capped(np.power(rank_E, -pattern.exponent), top_k)
    if pattern.kind == "hot":
        hot, share = pattern.num_hot, pattern.hot_share
        if hot >= num_experts:
            raise InvalidRequest(
                f"hot:{hot}:{share:g}: the model has {num_experts} experts, limit is {num_experts - 1}"
            )
        rest = (1 - share) / (num_experts - hot)
        if max(share / hot, rest) > 1 / top_k + 1e-9:
            raise InvalidRequest(
                f"hot:{hot}:{share:g}: with {top_k} different experts per token, {hot} of {num_experts} experts take "
                f"a share of {max(0.0, 1 - (num_experts - hot) / top_k):.3g}..{min(1.0, hot / top_k):.3g}"
            )
        return np.array([share / hot] * hot + [rest] * (num_experts - hot))
    return np.full(num_experts, 1 / num_experts)


def ranks_after_moves(num_moves: int, *, layer: int, num_experts: int, seed: int) -> npt.NDArray[np.int64]:
    """The place in the order of heat that each expert [E] of the layer-th layer has, 0 being the hottest.

    Before the first move expert (layer + r) modulo E has place r; each move makes an independent permutation.
    """
    if not num_moves:
        return (np.arange(num_experts) - layer) % num_experts
    return np.random.default_rng((seed, num_moves, layer)).permutation(num_experts)


def draw_routing(share_E: Shares, *, num_tokens: int, top_k: int, rng: np.random.Generator) -> Routing:
    """K distinct experts per token, each expert with its share of all pairs, and weights that sum to 1 per token."""
    order_E = rng.permutation(len(share_E))  # else neighbours would never meet in one token
    edge_E = np.cumsum(share_E[order_E]) * top_k
    edge_E[-1] = top_k
    points_TK = rng.random((num_tokens, 1)) + np.arange(top_k)
    expert_TK = order_E[np.searchsorted(edge_E, points_TK, side="right")]
    weight_TK = -np.sort(-rng.dirichlet(np.full(top_k, 4.0), num_tokens), axis=1)
    return Routing(expert_TK=rng.permuted(expert_TK, axis=1).astype(np.int32), weight_TK=weight_TK.astype(np.float32))


def _capped(weight_E: Shares, top_k: int) -> Shares:
    """Shares in proportion to the weights, none above 1/K."""
    share_E: Shares = weight_E / weight_E.sum()
    full_E = np.zeros(len(share_E), dtype=bool)
    while (share_E > 1 / top_k + 1e-12).any():
        full_E |= share_E >= 1 / top_k
        left = 1 - full_E.sum() / top_k
        rest_E = np.where(full_E, 0.0, weight_E)
        share_E = np.where(full_E, 1 / top_k, rest_E * (left / max(rest_E.sum(), 1e-300)))
    return share_E
