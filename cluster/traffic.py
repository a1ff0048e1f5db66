"""The requests a load generator sends: hidden states, the layer they go to, and where drawn, their routing.

Shapes: T tokens, D model dim, N recorded rows.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cluster.patterns import Pattern, Shares, draw_routing, expert_shares, ranks_after_moves
from protos.codec import TORCH_DTYPES
from protos.router_pb2 import DescribeResponse
from router.gate import Routing

_POOL = 8  # batches of random hidden states made in advance: drawing them anew would cost more than sending them


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One request. `routing` None leaves the choice to the model's gate."""

    layer: str
    x_TD: Tensor
    routing: Routing | None = None


class Traffic(Protocol):
    """An endless supply of requests."""

    def next(self) -> Work:
        """The next request."""


def random_states(model: DescribeResponse, *, num_tokens: int, seed: int = 0) -> Iterator[Tensor]:
    """Hidden states [T, D] of unit RMS, endlessly."""
    generator = torch.Generator().manual_seed(seed)
    dtype = TORCH_DTYPES[model.dtype]
    return cycle(  # which keeps what it has seen
        torch.randn(num_tokens, model.dim, generator=generator).to(dtype) for _ in range(_POOL)
    )


class DrawnTraffic:
    """Random hidden states of unit RMS whose experts a pattern draws; layers in turn.

    The hottest expert of the l-th layer is expert l (modulo E): with the same one everywhere, a placement that deals
    experts to servers in order would put all of them on one server. Where the hot spot moves, each move gives every
    layer an arrangement of its own, independent of those before.

    Args:
        move_every_s: seconds after which other experts become the hot ones, again and again; None: never.
        clock: what these seconds are counted on; the first request begins them (`began_s`).

    Raises:
        InvalidRequest: the model cannot have that pattern.
    """

    def __init__(
        self,
        pattern: Pattern,
        model: DescribeResponse,
        *,
        num_tokens: int,
        seed: int = 0,
        move_every_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._share_E = expert_shares(pattern, num_experts=model.num_experts, top_k=model.top_k)
        self._rng = np.random.default_rng(seed)
        self._seed = seed
        self._num_tokens, self._top_k = num_tokens, model.top_k
        self._names = tuple(model.layers)
        self._move_every_s, self._clock = move_every_s, clock
        self.began_s: float | None = None
        self.num_moves = 0
        self._pool = random_states(model, num_tokens=num_tokens, seed=seed)
        self._layers = cycle(self._names)
        self._shares = self.shares(0)

    def shares(self, num_moves: int) -> dict[str, Shares]:
        """Each expert's share of the pairs [E] by layer, after so many moves of the hot spot."""
        return {
            layer: self._share_E[ranks_after_moves(num_moves, layer=i, num_experts=len(self._share_E), seed=self._seed)]
            for i, layer in enumerate(self._names)
        }

    def next(self) -> Work:
        if self._move_every_s is not None:
            self._move(self._move_every_s)
        layer = next(self._layers)
        routing = draw_routing(self._shares[layer], num_tokens=self._num_tokens, top_k=self._top_k, rng=self._rng)
        return Work(layer=layer, x_TD=next(self._pool), routing=routing)

    def _move(self, every_s: float) -> None:
        now_s = self._clock()
        if self.began_s is None:
            self.began_s = now_s
        num_moves = int((now_s - self.began_s) / every_s)
        if num_moves > self.num_moves:
            self.num_moves, self._shares = num_moves, self.shares(num_moves)


class TraceTraffic:
    """Recorded hidden states, block after block and layer after layer, from the start again at the end.

    Args:
        states: layer name to [N, D]; what does not fill a last block is joined to the beginning.
        num_tokens: T of every request.
    """

    def __init__(self, states: Mapping[str, Tensor], *, num_tokens: int) -> None:
        self._states, self._num_tokens = dict(states), num_tokens
        self._at = dict.fromkeys(states, 0)
        self._layers = cycle(states)

    def next(self) -> Work:
        layer = next(self._layers)
        x_ND, at = self._states[layer], self._at[layer]
        self._at[layer] = (at + self._num_tokens) % len(x_ND)
        if at + self._num_tokens <= len(x_ND):
            return Work(layer=layer, x_TD=x_ND[at : at + self._num_tokens])
        row_T = (at + torch.arange(self._num_tokens)) % len(x_ND)
        return Work(layer=layer, x_TD=x_ND[row_T])
