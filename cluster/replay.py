"""Recorded routing traces as a simulated workload: at every moment the rate, tokens and experts recorded around it.

A trace is cut into windows of equal length, and begins again at its end. Within a window the rate is its mean, and
requests take its tokens in order, from its start again at its end: if the trace is a sample, or is replayed at twice
its rate, they take each several times. So tokens and shares change at the recorded speed, whatever the rate.

Shapes: L layers, E experts, K experts per token, N recorded tokens of a layer, W windows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.traces import RoutingTrace, check_windows
from cluster.workloads import Shares, Workload
from protos.errors import InvalidRequest
from router.gate import Routing

WINDOW_S = 1.0  # about: every window of a trace is as long as the others


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerTrace:
    """Recorded tokens of one layer in order of time."""

    time_N: npt.NDArray[np.float64]  # seconds since the trace began
    expert_NK: npt.NDArray[np.int32]  # -1 where a token had fewer than K
    weight_NK: npt.NDArray[np.float32]


class TraceHeat:
    """Tokens, shares and rates of a trace, window by window.

    Args:
        layers: one trace for each layer, in order.
        num_experts: E.
    """

    def __init__(self, layers: Sequence[LayerTrace], *, num_experts: int) -> None:
        self._layers = layers
        self._span_s = max(max(float(layer.time_N[-1]) for layer in layers), WINDOW_S)
        self._num_windows = max(1, round(self._span_s / WINDOW_S))
        self._window_s = self._span_s / self._num_windows
        edge_W = np.arange(1, self._num_windows) * self._window_s
        self._first_LW1 = np.stack(
            [np.r_[0, np.searchsorted(layer.time_N, edge_W), len(layer.time_N)] for layer in layers]
        )
        self._share_WLE = _windowed(layers, self._first_LW1, num_experts)

    @property
    def top_k(self) -> int:
        """K."""
        return int(self._layers[0].expert_NK.shape[1])

    def tokens_per_s(self, now_s: float) -> float:
        """Recorded tokens per second around a moment, of all layers together."""
        window, _ = self._place(now_s)
        return float(np.diff(self._first_LW1[:, window : window + 2]).sum()) / self._window_s

    def shares(self, now_s: float) -> Shares:
        window, _ = self._place(now_s)
        share_LE: Shares = self._share_WLE[window]
        return share_LE

    def routing(self, row: int, num_tokens: int, now_s: float, rng: np.random.Generator) -> Routing:
        """Of the tokens recorded around `now_s`; a window without any takes from the whole trace, as its shares do."""
        layer, (window, part) = self._layers[row], self._place(now_s)
        first, end = self._first_LW1[row, window : window + 2].tolist()
        if first == end:
            first, end = 0, len(layer.time_N)
        token_T = first + (int(part * (end - first)) + np.arange(num_tokens)) % (end - first)
        return Routing(expert_TK=layer.expert_NK[token_T], weight_TK=layer.weight_NK[token_T])

    def onsets(self, until_s: float) -> list[float]:
        return []

    def _place(self, now_s: float) -> tuple[int, float]:
        """The window of a moment, and how much of it has passed."""
        windows = now_s % self._span_s / self._window_s
        window = min(int(windows), self._num_windows - 1)
        return window, windows - window


def _windowed(layers: Sequence[LayerTrace], first_LW1: npt.NDArray[np.int64], num_experts: int) -> Shares:
    """share_WLE: shares of every window; one without pairs of a layer has that layer's mean."""
    num_windows = first_LW1.shape[1] - 1
    share_WLE = np.zeros((num_windows, len(layers), num_experts))
    for row, layer in enumerate(layers):
        window_N = np.repeat(np.arange(num_windows), np.diff(first_LW1[row]))
        window_NK = np.broadcast_to(window_N[:, None], layer.expert_NK.shape)
        there_NK = (layer.expert_NK >= 0) & (layer.expert_NK < num_experts)
        np.add.at(share_WLE[:, row], (window_NK[there_NK], layer.expert_NK[there_NK]), 1.0)
    mean_LE = share_WLE.sum(axis=0)
    empty_WL = share_WLE.sum(axis=2) == 0
    share_WLE = np.where(empty_WL[:, :, None], mean_LE, share_WLE)
    shares: Shares = share_WLE / np.maximum(share_WLE.sum(axis=2, keepdims=True), 1.0)
    return shares


def trace_heat(trace: RoutingTrace) -> TraceHeat:
    """All tokens of a trace, in memory.

    Raises:
        InvalidRequest: a layer has no tokens, or the trace is too long; see also `check_windows`, RoutingTrace.
    """
    info, longest = trace.info, 1
    check_windows(trace, window_s=WINDOW_S, numbers=len(info.layers) * info.num_experts)
    times: list[list[npt.NDArray[np.float64]]] = [[] for _ in info.layers]
    experts: list[list[npt.NDArray[np.int32]]] = [[] for _ in info.layers]
    weights: list[list[npt.NDArray[np.float32]]] = [[] for _ in info.layers]
    first_s, _ = trace.span_s
    for batch in trace.batches():
        num_tokens, row_P = len(batch.token_T), batch.rows()
        place_P = np.arange(len(row_P)) - batch.first_T1[:-1][row_P] + batch.first_T1[0]
        longest = max(longest, int(np.diff(batch.first_T1).max(initial=0)))
        expert_TK = np.full((num_tokens, longest), -1, dtype=np.int32)
        weight_TK = np.zeros((num_tokens, longest), dtype=np.float32)
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
                expert_NK=_joined(experts[row], longest, fill=-1)[order_N],
                weight_NK=_joined(weights[row], longest, fill=0)[order_N],
            )
        )
    return TraceHeat(layers, num_experts=info.num_experts)


def _joined(parts: Sequence[npt.NDArray[Any]], width: int, *, fill: int) -> npt.NDArray[Any]:
    """Arrays of at most so many columns below each other; where one has fewer, `fill`."""
    return np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=fill) for part in parts])


def replay(trace: RoutingTrace, *, num_tokens: int, visits: int) -> Workload:
    """A trace as a workload, at the rate it was recorded with over time (a sampled one scaled up to all tokens).

    Args:
        num_tokens: of the requests into which its tokens are cut.
        visits: layers a request goes through.

    Raises:
        InvalidRequest: as for `trace_heat`.
    """
    info, heat = trace.info, trace_heat(trace)
    per_request = num_tokens * visits * info.sampled_share  # recorded tokens

    def rate(elapsed_s: float) -> float:
        return heat.tokens_per_s(elapsed_s) / per_request

    return Workload(
        layers=info.layers,
        num_experts=info.num_experts,
        top_k=heat.top_k,
        heat=heat,
        rate=rate,
        num_tokens=num_tokens,
        visits=visits,
    )
