"""`expertmesh load`: a load generator against a router."""

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.cli_options import Json, check_address, read_named_model
from cluster.console import CommandError, bad_input, output
from cluster.rates import parse_rate


def load(
    *,
    router: Annotated[str, typer.Option("--router", metavar="H:P", help="router endpoint")],
    pattern: Annotated[
        str,
        typer.Option(help="uniform, zipf:A, hot:N:SHARE, or trace:FILE of hidden states or (.parquet) of routings"),
    ] = "uniform",
    rate: Annotated[
        str | None,
        typer.Option(metavar="R", help="requests per second (open loop); S:R,S:R,... for a rate that changes"),
    ] = None,
    concurrency: Annotated[int | None, typer.Option(metavar="C", help="open requests (closed loop; default 4)")] = None,
    tokens: Annotated[int, typer.Option(metavar="T", help="tokens per request")] = 64,
    move_every: Annotated[
        float | None, typer.Option(metavar="S", help="seconds after which other experts become the hot ones")
    ] = None,
    duration: Annotated[float, typer.Option(metavar="S", help="seconds")] = 10.0,
    timeout: Annotated[float, typer.Option(metavar="S", help="seconds an answer may take")] = 30.0,
    record: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write what was routed as a routing trace (.parquet)")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="DIR", help="the served model, to check answers; default: the router's path")
    ] = None,
    check: Annotated[float, typer.Option(metavar="SHARE", help="share of answers to check")] = 0.1,
    as_json: Json = False,
) -> None:
    """Load a router, check answers, report throughput, latency, ledger totals and errors; status 1 on wrong answers."""
    with output(as_json=as_json) as out:
        check_address(router)
        if rate is not None and concurrency is not None:
            raise bad_input("--rate (open loop) and --concurrency (closed loop) exclude each other")
        for name, value in {
            "concurrency": concurrency,
            "tokens": tokens,
            "move-every": move_every,
            "duration": duration,
            "timeout": timeout,
        }.items():
            if value is not None and not 0 < value < float("inf"):
                raise bad_input(f"--{name} is {value:g}, it must be above 0")
        if not 0 <= check <= 1:
            raise bad_input(f"--check is {check:g}, it must be a share of 0..1")
        wanted_rate = None if rate is None else parse_rate(rate)
        import torch

        from cluster.arrays import writable
        from cluster.patterns import parse_pattern
        from cluster.run_load import run_load

        torch.set_num_threads(1)  # checking must not take the servers' cores
        spec = None if model is None else read_named_model(model)
        document = asyncio.run(
            run_load(
                router,
                parse_pattern(pattern),
                rate=wanted_rate,
                move_every_s=move_every,
                concurrency=concurrency,
                num_tokens=tokens,
                duration_s=duration,
                timeout_s=timeout,
                model=None if spec is None else spec.path,
                check_share=check,
                record=None if record is None else writable(record),
            )
        )
        out.document(document)
        for line in _load_lines(document):
            out.line(line)
        _require_good_load(document)


def _load_lines(document: dict[str, Any]) -> list[str]:
    requests, ledger, checks = document["requests"], document["ledger"], document["checks"]
    took = {name: "-" if value is None else f"{value * 1e3:.3g} ms" for name, value in document["latency_s"].items()}
    lines = [
        f"{document['tokens_per_s']:,.0f} tokens/s, {document['requests_per_s']:,.1f} requests/s "
        f"over {document['seconds']:.1f} s",
        f"latency p50 {took['p50']}, p90 {took['p90']}, p99 {took['p99']}, max {took['max']}",
        f"requests {requests['sent']}, failed {requests['failed']}"
        + "".join(f", {name} {count}" for name, count in document["errors"].items()),
        "pairs " + ", ".join(f"{name} {value}" for name, value in ledger.items() if isinstance(value, int)),
    ]
    if document["checking"]:
        lines.append(
            f"answers checked {checks['checked']}, wrong {checks['wrong']}, "
            f"largest relative error {checks['largest_error']:.1e}"
        )
    else:
        lines.append("answers not checked: the model's directory is not on this machine (--model)")
    return lines


def _require_good_load(document: dict[str, Any]) -> None:
    if document["checks"]["wrong"]:
        raise CommandError(f"{document['checks']['wrong']} wrong answers: {document['checks']['first_wrong']}")
    if not document["requests"]["answered"]:
        raise CommandError(f"no request was answered: {document['first_error'] or 'none was sent'}")
