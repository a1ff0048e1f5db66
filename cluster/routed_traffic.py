"""A routing trace as traffic: the recorded experts and weights, at the recorded times or faster or slower.

Shapes: T tokens of a request, K experts per token.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
from torch import Tensor

from cluster.traces import RoutingTrace, TraceBatch, check_windows
from cluster.traffic import Work, random_states
from protos.errors import InvalidRequest
from protos.router_pb2 import DescribeResponse
from router.gate import Routing

WINDOW_S = 0.5  # the rate of a replay is that of the trace over windows of this length


class RoutedTraffic:
    """Random hidden states with the routing of a trace, in its order, from the start again at the end.

    Consecutive rows of the same time and layer are one request, split at `max_tokens`.

    Raises:
        InvalidRequest: the trace is empty, or of a model with other layers or more experts.
    """

    def __init__(self, trace: RoutingTrace, model: DescribeResponse, *, max_tokens: int) -> None:
        unknown = [layer for layer in trace.info.layers if layer not in model.layers]
        if unknown or trace.info.num_experts > model.num_experts:
            raise InvalidRequest(
                f"{trace.path}: is of a model with {trace.info.num_experts} experts and layers "
                f"{', '.join(trace.info.layers)}, the router serves {model.num_experts} and {', '.join(model.layers)}"
            )
        if not trace.num_tokens:
            raise InvalidRequest(f"{trace.path}: has no rows")
        self._trace, self._model, self._max_tokens = trace, model, max_tokens
        self._states, self._longest = random_states(model, num_tokens=1), 1
        self._works = self._all()

    def next(self) -> Work:
        return next(self._works)

    def _all(self) -> Iterator[Work]:
        while True:
            for batch in self._trace.batches():
                for begin, end in spans(batch, self._max_tokens):
                    layer = self._trace.info.layers[batch.layer_T[begin]]
                    routing = _routing(batch, begin, end)
                    yield Work(layer=layer, x_TD=self._some_states(end - begin), routing=routing)

    def _some_states(self, num_tokens: int) -> Tensor:
        if num_tokens > self._longest:
            self._states, self._longest = random_states(self._model, num_tokens=num_tokens), num_tokens
        return next(self._states)[:num_tokens]


def _routing(batch: TraceBatch, begin: int, end: int) -> Routing:
    """The routing of some rows; where rows have fewer experts than others, -1 fills them up."""
    count_T = np.diff(batch.first_T1[begin : end + 1])
    place_TK = np.arange(int(count_T.max()))
    there_TK = place_TK < count_T[:, None]
    expert_TK = np.full(there_TK.shape, -1, dtype=np.int32)
    weight_TK = np.zeros(there_TK.shape, dtype=np.float32)
    pairs = slice(batch.first_T1[begin], batch.first_T1[end])
    expert_TK[there_TK], weight_TK[there_TK] = batch.expert_P[pairs], batch.weight_P[pairs]
    return Routing(expert_TK=expert_TK, weight_TK=np.where(expert_TK < 0, np.float32(0), weight_TK))


def spans(batch: TraceBatch, max_tokens: int) -> Iterator[tuple[int, int]]:
    """The rows [begin, end) of the requests of a batch."""
    changes_T = (np.diff(batch.time_s_T) != 0) | (np.diff(batch.layer_T) != 0)
    edges = [0, *(np.flatnonzero(changes_T) + 1).tolist(), len(batch.token_T)]
    for begin, end in pairwise(edges):
        for first in range(begin, end, max_tokens):
            yield first, min(first + max_tokens, end)


def recorded_rate(trace: RoutingTrace, *, max_tokens: int, mean: float | None = None) -> Callable[[float], float]:
    """The requests per second of a replay over time, in steps of WINDOW_S; after its end it begins again.

    Args:
        mean: requests per second on average: the trace runs faster or slower to have it; None: as recorded.

    Raises:
        InvalidRequest: the trace is longer than its windows may take memory; see also RoutingTrace.
    """
    check_windows(trace, window_s=WINDOW_S, numbers=1)
    first_s, last_s = trace.span_s
    length_s = max(last_s - first_s, WINDOW_S)
    count_W = np.zeros(int((last_s - first_s) / WINDOW_S) + 1)
    for batch in trace.batches():
        begins = [begin for begin, _ in spans(batch, max_tokens)]
        np.add.at(count_W, ((batch.time_s_T[begins] - first_s) / WINDOW_S).astype(np.int64), 1)
    usual = float(count_W.sum()) / length_s
    faster = 1.0 if mean is None else mean / usual

    def rate(elapsed_s: float) -> float:
        window = int(elapsed_s * faster % length_s / WINDOW_S)
        covered_s = min(WINDOW_S, length_s - window * WINDOW_S) or WINDOW_S
        return float(count_W[min(window, len(count_W) - 1)]) / covered_s * faster

    return rate
