"""Recorded routing traces as a simulated workload: the same tokens, to the same experts, in the same order.

Shapes: L layers, E experts, K experts per token, N recorded tokens of a layer, W windows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster.traces import RoutingTrace
from cluster.workloads import Shares, Workload
from protos.errors import InvalidRequest
from router.gate import Routing


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerTrace:
    """Recorded tokens of one layer in order of time."""

    time_N: npt.NDArray[np.float64]  # seconds since the trace began
    expert_NK: npt.NDArray[np.int32]  # -1 where a token had fewer than K
    weight_NK: npt.NDArray[np.float32]


class TraceHeat:
    """Tokens as a trace has them, one after another and from the start again at the end; shares window by window.

    Args:
        layers: one trace for each layer, in order.
        num_experts: E.
        window_s: seconds over which shares are averaged.
    """

    def __init__(self, layers: Sequence[LayerTrace], *, num_experts: int, window_s: float = 1.0) -> None:
        self._layers = layers
        self._next = [0] * len(layers)
        self._window_s = window_s
        self._span_s = max(max(float(layer.time_N[-1]) for layer in layers), window_s)
        self._share_WLE = _windowed(layers, num_experts, window_s, math.ceil(self._span_s / window_s + 1e-9))

    @property
    def tokens_per_s(self) -> float:
        """Recorded tokens per second of a layer, on average."""
        return sum(len(layer.time_N) for layer in self._layers) / len(self._layers) / self._span_s

    def shares(self, now_s: float) -> Shares:
        share_LE: Shares = self._share_WLE[int(now_s % self._span_s / self._window_s) % len(self._share_WLE)]
        return share_LE

    def routing(self, row: int, num_tokens: int, now_s: float, rng: np.random.Generator) -> Routing:
        layer, first = self._layers[row], self._next[row]
        token_T = (first + np.arange(num_tokens)) % len(layer.time_N)
        self._next[row] = (first + num_tokens) % len(layer.time_N)
        return Routing(expert_TK=layer.expert_NK[token_T], weight_TK=layer.weight_NK[token_T])

    def onsets(self, until_s: float) -> list[float]:
        return []


def _windowed(layers: Sequence[LayerTrace], num_experts: int, window_s: float, num_windows: int) -> Shares:
    """share_WLE: shares of every window; one without tokens of a layer has that layer's mean."""
    share_WLE = np.zeros((num_windows, len(layers), num_experts))
    for row, layer in enumerate(layers):
        window_N = np.minimum((layer.time_N / window_s).astype(np.int64), num_windows - 1)
        window_NK = np.broadcast_to(window_N[:, None], layer.expert_NK.shape)
        there_NK = (layer.expert_NK >= 0) & (layer.expert_NK < num_experts)
        np.add.at(share_WLE[:, row], (window_NK[there_NK], layer.expert_NK[there_NK]), 1.0)
    mean_LE = share_WLE.sum(axis=0)
    empty_WL = share_WLE.sum(axis=2) == 0
    share_WLE = np.where(empty_WL[:, :, None], mean_LE, share_WLE)
    shares: Shares = share_WLE / share_WLE.sum(axis=2, keepdims=True)
    return shares


def trace_heat(trace: RoutingTrace) -> TraceHeat:
    """All tokens of a trace, in memory.

    Raises:
        InvalidRequest: a layer has no tokens; see also RoutingTrace.
    """
    info = trace.info
    times: list[list[npt.NDArray[np.float64]]] = [[] for _ in info.layers]
    experts: list[list[npt.NDArray[np.int32]]] = [[] for _ in info.layers]
    weights: list[list[npt.NDArray[np.float32]]] = [[] for _ in info.layers]
    first_s, _ = trace.span_s
    for batch in trace.batches():
        num_tokens, row_P = len(batch.token_T), batch.rows()
        place_P = np.arange(len(row_P)) - batch.first_T1[:-1][row_P] + batch.first_T1[0]
        expert_TK = np.full((num_tokens, info.top_k), -1, dtype=np.int32)
        weight_TK = np.zeros((num_tokens, info.top_k), dtype=np.float32)
        expert_TK[row_P, place_P], weight_TK[row_P, place_P] = batch.expert_P, batch.weight_P
        for row in range(len(info.layers)):
            mine_T = batch.layer_T == row
            times[row].append(batch.time_s_T[mine_T] - first_s)
            experts[row].append(expert_TK[mine_T])
            weights[row].append(weight_TK[mine_T])
    layers = []
    for row, layer in enumerate(info.layers):
        time_N = np.concatenate(times[row])
        if not len(time_N):
            raise InvalidRequest(f"{trace.path}: layer {layer} has no tokens")
        order_N = np.argsort(time_N, kind="stable")
        layers.append(
            LayerTrace(
                time_N=time_N[order_N],
                expert_NK=np.concatenate(experts[row])[order_N],
                weight_NK=np.concatenate(weights[row])[order_N],
            )
        )
    return TraceHeat(layers, num_experts=info.num_experts)


def replay(trace: RoutingTrace, *, num_tokens: int, visits: int) -> Workload:
    """A trace as a workload, at the mean rate it was recorded with (a sampled one scaled up to all tokens).

    Args:
        num_tokens: of the requests into which its tokens are cut.
        visits: layers a request goes through.

    Raises:
        InvalidRequest: as for `trace_heat`.
    """
    info, heat = trace.info, trace_heat(trace)
    per_layer = heat.tokens_per_s / info.sampled_share
    return Workload(
        layers=info.layers,
        num_experts=info.num_experts,
        top_k=info.top_k,
        heat=heat,
        rate=per_layer * len(info.layers) / (num_tokens * visits),
        num_tokens=num_tokens,
        visits=visits,
    )
