"""What a server says of itself: its copies, how busy it is, where its copies came from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from experts.sources import Source, SourceTotals
from experts.weights import CopyKey
from protos import expert_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerReport:
    """What one server holds and how busy it is. Tokens are routed pairs."""

    server_id: str
    address: str
    pid: int
    state: Literal["serving", "draining"]
    copies: frozenset[CopyKey]
    bytes: int
    budget_bytes: int
    queue_tokens: int
    busy_share: float  # of the last second, 0..1
    tokens: Mapping[CopyKey, int]  # computed since each copy was loaded
    loaded: Mapping[Source, SourceTotals]  # since the server started
    compute_dtype: str
    emulated_tokens_per_s: float | None


def status_response(report: ServerReport) -> expert_pb2.StatusResponse:
    """The report as the Status method answers it."""
    draining = report.state == "draining"
    return expert_pb2.StatusResponse(
        server_id=report.server_id,
        state=expert_pb2.SERVER_STATE_DRAINING if draining else expert_pb2.SERVER_STATE_SERVING,
        copies=[
            expert_pb2.ExpertCopy(layer=layer, expert=expert, tokens=tokens)
            for (layer, expert), tokens in sorted(report.tokens.items())
        ],
        bytes=report.bytes,
        budget_bytes=report.budget_bytes,
        queue_tokens=report.queue_tokens,
        busy_share=report.busy_share,
        compute_dtype=report.compute_dtype,
        emulated_tokens_per_s=report.emulated_tokens_per_s or 0.0,
        pid=report.pid,
    )
