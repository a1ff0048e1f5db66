"""`expertmesh simulate`: what a cluster would do, without the machines."""

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cluster.cli_options import Json
from cluster.console import bad_input, output

if TYPE_CHECKING:
    from cluster.config import ClusterConfig
    from cluster.sim_servers import Machine
    from cluster.simulate import Fault
    from cluster.workloads import Workload
    from protos.model import ModelSpec


def simulate(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml", help="cluster to simulate; its weights are not read")
    ],
    *,
    model: Annotated[str | None, typer.Option(metavar="DIR", help="instead of the file's")] = None,
    pattern: Annotated[str, typer.Option(help="experts that get the load: uniform, zipf:A or hot:N:SHARE")] = "uniform",
    load: Annotated[
        Path | None, typer.Option(metavar="FILE", help="load matrix [L, E] instead, as `plan` reads it")
    ] = None,
    trace: Annotated[Path | None, typer.Option(metavar="F", help="recorded routing instead (Parquet)")] = None,
    rate: Annotated[
        str | None,
        typer.Option(
            metavar="R",
            help="requests per second: R; S:R,S:R,...; diurnal:LOW:HIGH:PERIOD_S; flash:BASE:PEAK:AT_S:HOLD_S "
            "(default: the trace's, else 50)",
        ),
    ] = None,
    times: Annotated[float, typer.Option(metavar="X", help="that rate times X: 2 doubles the traffic")] = 1.0,
    tokens: Annotated[int, typer.Option(metavar="T", help="tokens per request")] = 64,
    visits: Annotated[int, typer.Option(metavar="N", help="layers a request goes through; 0: all")] = 1,
    poisson: Annotated[bool, typer.Option("--poisson", help="requests come at random, not evenly")] = False,
    move_every: Annotated[float | None, typer.Option(metavar="S", help="seconds until others become hot")] = None,
    move: Annotated[Literal["jump", "drift"], typer.Option(help="how they do, with --move-every")] = "jump",
    duration: Annotated[float, typer.Option(metavar="S", help="simulated seconds")] = 60.0,
    warm_up: Annotated[float, typer.Option(metavar="S", help="first seconds that latencies leave out")] = 0.0,
    lose: Annotated[
        list[str] | None,
        typer.Option(metavar="N@S", help="lose the N-th running server at second S (N@S:silent: no reset); repeatable"),
    ] = None,
    capacity_factor: Annotated[float | None, typer.Option(metavar="F", help="instead of the file's")] = None,
    chain: Annotated[str | None, typer.Option(metavar="A,B", help="overflow chain instead of the file's")] = None,
    servers: Annotated[int | None, typer.Option(metavar="N", help="exactly so many, no scaling")] = None,
    static: Annotated[bool, typer.Option("--static", help="keep the first placement")] = False,
    clairvoyant: Annotated[
        float | None, typer.Option(metavar="U", help="plan and scale for the load to come, at utilisation U")
    ] = None,
    slo: Annotated[float, typer.Option(metavar="S", help="latency a request may have")] = 0.25,
    machine: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=X", help="a constant of the machines, such as pairs_per_s or start_s; repeatable"),
    ] = None,
    scale: Annotated[int, typer.Option(metavar="N", help="real requests per simulated one; 0: chosen by load")] = 0,
    seed: Annotated[int, typer.Option(help="of everything that is drawn")] = 0,
    as_json: Json = False,
) -> None:
    """Simulate a cluster: the real planner, scaling and overflow code on servers with service times."""
    with output(as_json=as_json) as out:
        above_0 = {"times": times, "tokens": tokens, "duration": duration, "slo": slo}
        for name, value in (above_0 | {"move-every": move_every, "clairvoyant": clairvoyant}).items():
            if value is not None and not 0 < value < float("inf"):
                raise bad_input(f"--{name} is {value:g}, it must be above 0")
        for name, count in {"visits": visits, "scale": scale, "seed": seed}.items():
            if count < 0:
                raise bad_input(f"--{name} is {count}, it must not be negative")
        if not 0 <= warm_up < duration:
            raise bad_input(f"--warm-up is {warm_up:g}, it must be within 0..duration ({duration:g})")
        if load is not None and trace is not None:
            raise bad_input("--load and --trace exclude each other")
        faults = [_fault(text, duration) for text in lose or ()]
        from cluster.config import load_config
        from cluster.models import find_model
        from cluster.sim_control import Foresight
        from cluster.sim_view import simulation_lines
        from cluster.simulate import Simulation, check_one_pool, choose_scale
        from cluster.workloads import Faster, parse_traffic
        from protos.checkpoint import read_model

        given = load_config(config, model=model)
        check_one_pool(given)
        wanted = _changed(given, capacity_factor=capacity_factor, chain=chain, servers=servers)
        spec = read_model(find_model(wanted.model))
        workload = _workload(
            spec, pattern, load, trace, tokens, visits, None if move_every is None else move, move_every
        )
        if rate is not None:
            workload = replace(workload, rate=parse_traffic(rate))
        workload = replace(workload, rate=Faster(rate=workload.rate, factor=times), poisson=poisson)
        constants = _machine(wanted, machine or ())
        found = Simulation(
            wanted,
            workload,
            constants,
            copy_bytes=_copy_bytes(spec, wanted),
            row_bytes=spec.expert_dim * (4 if spec.dtype == "float32" else 2),
            faults=faults,
            slo_s=slo,
            foresight=None
            if clairvoyant is None
            else Foresight(utilisation=clairvoyant, lead_s=constants.start_s + 1.0),
            static=static,
            scale=scale or choose_scale(workload, duration),
            seed=seed,
        ).run(duration, warm_up_s=warm_up)
        document = {"model": str(spec.path), "machine": {f.name: getattr(constants, f.name) for f in fields(constants)}}
        document |= found
        out.document(document)
        for line in simulation_lines(document):
            out.line(line)


def _fault(text: str, duration_s: float) -> "Fault":
    from cluster.simulate import Fault

    where, _, kind = text.partition(":")
    server, _, at_s = where.partition("@")
    try:
        if kind in ("", "kill", "silent") and int(server) >= 0 and 0 <= float(at_s) < float("inf"):
            if float(at_s) >= duration_s:
                raise bad_input(f"--lose is {text!r}, it must be before the end: --duration is {duration_s:g}")
            return Fault(at_s=float(at_s), server=int(server), kind="silent" if kind == "silent" else "kill")
    except ValueError:
        pass
    raise bad_input(f"--lose is {text!r}, expected SERVER@SECOND or SERVER@SECOND:silent, such as 3@20")


def _changed(
    config: "ClusterConfig", *, capacity_factor: float | None, chain: str | None, servers: int | None
) -> "ClusterConfig":
    """The config with what the command line asks for instead."""
    from cluster.config import parse_config

    data: dict[str, Any] = config.model_dump()
    overflow = data["router"]["settings"]["overflow"]
    if capacity_factor is not None:
        overflow["capacity_factor"] = capacity_factor
    if chain is not None:
        overflow["chain"] = [step.strip() for step in chain.split(",")]
    if servers is not None:
        data["experts"] |= {"min_servers": servers, "max_servers": servers}
    return parse_config(data, where="options")


def _workload(
    spec: "ModelSpec",
    pattern: str,
    load: Path | None,
    trace: Path | None,
    tokens: int,
    visits: int,
    move: Literal["jump", "drift"] | None,
    move_every: float | None,
) -> "Workload":
    from cluster.patterns import parse_pattern
    from cluster.workloads import DrawnHeat, Workload, pattern_shares

    experts, top_k, visits = spec.num_experts, spec.top_k, visits or len(spec.layers)
    if trace is not None:
        from cluster.replay import replay
        from cluster.traces import RoutingTrace

        found = replay(RoutingTrace(trace), num_tokens=tokens, visits=visits)
        if (found.layers, found.num_experts) != (spec.layers, spec.num_experts):
            raise bad_input(
                f"{trace} has layers {', '.join(found.layers)} of {found.num_experts} experts, the model has "
                f"{', '.join(spec.layers)} of {spec.num_experts}"
            )
        return found
    if load is not None:
        from cluster.loadfile import read_load

        share_LE = read_load(load).load_LE
        if share_LE.shape != (len(spec.layers), experts):
            raise bad_input(
                f"{load}: load has shape {list(share_LE.shape)}, the model's is {[len(spec.layers), experts]}"
            )
    else:
        share_LE = pattern_shares(parse_pattern(pattern), num_layers=len(spec.layers), num_experts=experts, top_k=top_k)
    heat = DrawnHeat(share_LE, top_k=spec.top_k, move=move or "never", every_s=move_every or float("inf"))
    return Workload(
        layers=spec.layers,
        num_experts=experts,
        top_k=top_k,
        heat=heat,
        rate=50.0,
        num_tokens=tokens,
        visits=visits,
    )


def _machine(config: "ClusterConfig", given: "list[str] | tuple[str, ...]") -> "Machine":
    """The machines' constants: what the file emulates, then what the command line says."""
    from cluster.sim_servers import Machine

    names = [field.name for field in fields(Machine) if field.name != "emulated"]
    values: dict[str, float] = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            values[name] = float(value)
        except ValueError:
            values[name] = -1.0
        if name not in names or not 0 <= values[name] < float("inf"):
            raise bad_input(f"--machine is {text!r}, expected NAME=X from 0 on with a name of {', '.join(names)}")
    emulated = config.experts.settings.emulated_tokens_per_s
    values.setdefault("pairs_per_s", emulated or 0.0)
    for name in ("pairs_per_s", "load_bytes_per_s"):
        if values.get(name, 1.0) <= 0:
            raise bad_input(f"--machine {name}=X is needed, above 0: how fast a server is")
    return Machine(emulated=emulated is not None, **values)


def _copy_bytes(spec: "ModelSpec", config: "ClusterConfig") -> int:
    """Memory of a copy, as a server has it; compute_dtype auto counts as the model's own dtype."""
    import torch

    from experts.weights import bytes_per_copy

    settings = config.experts.settings
    name = spec.dtype if settings.compute_dtype == "auto" else settings.compute_dtype
    packed = None if settings.weight_dtype == "compute" else settings.weight_dtype
    return bytes_per_copy(spec, getattr(torch, name), packed)
