"""What `expertmesh load` does: traffic of a pattern or a trace, a load generator, a checker, one report."""

from pathlib import Path
from typing import Any

from cluster.arrays import read_trace
from cluster.checking import Checker
from cluster.loadgen import LoadGenerator, report
from cluster.patterns import Pattern
from cluster.rates import Rate
from cluster.run_model import reach
from cluster.traffic import DrawnTraffic, TraceTraffic, Traffic
from cluster.verify import packed_dtype
from protos.checkpoint import read_model
from protos.errors import InvalidRequest
from protos.loops import freeze_garbage_collector
from protos.model import ModelSpec
from protos.router_pb2 import DescribeResponse
from router.client import RouterClient


async def run_load(
    router: str,
    pattern: Pattern,
    *,
    rate: Rate | None,
    move_every_s: float | None = None,
    record: Path | None = None,
    concurrency: int | None,
    num_tokens: int,
    duration_s: float,
    timeout_s: float,
    model: Path | None,
    check_share: float,
) -> dict[str, Any]:
    """Load a router for `duration_s` seconds; see `LoadGenerator` for rate and concurrency.

    Args:
        rate: None with a routing trace and without concurrency: as recorded.
        concurrency: None: 4, where there is no rate.
        record: a routing trace of the answers to write; None: none.
        move_every_s: seconds after which other experts become the hot ones; None: never.
        model: the served model's directory here; None takes the router's word, and checks nothing if it is not here.
        check_share: of the answers to compute again, 0..1.

    Raises:
        Unavailable: nothing answers at the address.
        InvalidRequest: the pattern does not fit the model or has no hot spot to move, a trace cannot be read, or
            num_tokens is above the limit.
    """
    if move_every_s is not None and pattern.kind not in ("zipf", "hot"):
        raise InvalidRequest(f"--move-every needs a pattern with hot experts (zipf:A, hot:N:SHARE), not {pattern.kind}")
    async with RouterClient(router) as client:
        served = await reach(client)
        if num_tokens > served.max_request_tokens:
            raise InvalidRequest(
                f"tokens is {num_tokens}, limit is the router's max_request_tokens ({served.max_request_tokens})"
            )
        spec = _readable(model, served)
        traffic: Traffic
        if pattern.trace is not None and (pattern.trace.is_dir() or pattern.trace.suffix == ".parquet"):
            from cluster.routed_traffic import RoutedTraffic, recorded_rate  # pyarrow takes its time to import
            from cluster.traces import RoutingTrace

            trace, limit = RoutingTrace(pattern.trace), served.max_request_tokens
            traffic = RoutedTraffic(trace, served, max_tokens=limit)
            if concurrency is None and not callable(rate):
                rate = recorded_rate(trace, max_tokens=limit, mean=rate)
        elif pattern.trace is not None:
            states = read_trace(pattern.trace, tuple(served.layers), dim=served.dim)
            if unroutable := sorted(states.keys() & set(served.token_id_layers)):
                raise InvalidRequest(
                    f"pattern trace:{pattern.trace}: layers {', '.join(unroutable)} look their experts up by token id, "
                    "which a trace does not hold"
                )
            traffic = TraceTraffic(states, num_tokens=num_tokens)
        else:
            traffic = DrawnTraffic(pattern, served, num_tokens=num_tokens, move_every_s=move_every_s)
        packed = packed_dtype(served.weight_dtype)
        checker = (
            Checker(spec, share=check_share, weight_dtype=packed) if spec is not None and check_share > 0 else None
        )
        recorder = None
        if record is not None:
            from cluster.client_trace import ClientRecorder

            recorder = ClientRecorder(record, served)
        load = LoadGenerator(
            client,
            traffic,
            rate=rate,
            concurrency=concurrency or 4,
            timeout_s=timeout_s,
            checker=checker,
            on_answer=None if recorder is None else recorder.add,
        )
        freeze_garbage_collector()
        seconds = await load.run_for(duration_s)
        if checker is not None:
            await checker.close()
        recorded = None if recorder is None else await recorder.close()
    document = report(load.tally, checker.checks if checker is not None else None, seconds=seconds)
    return {"router": router, "model": served.model, "checking": checker is not None, "record": recorded} | document


def _readable(model: Path | None, served: DescribeResponse) -> ModelSpec | None:
    """The served model's spec read from this machine's files; None if it is not here and was not named."""
    if model is None and not Path(served.model).is_dir():
        return None
    spec = read_model(model or Path(served.model))
    ours = (spec.family, spec.dim, spec.num_experts, spec.layers)
    theirs = (served.family, served.dim, served.num_experts, tuple(served.layers))
    if ours != theirs:
        raise InvalidRequest(f"model {spec.path} is not the served one: {ours} against {theirs}")
    return spec
