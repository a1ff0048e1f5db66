"""`expertmesh plan`: the planner on a load matrix, without a cluster."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.cli_options import Json
from cluster.console import bad_input, output

_TABLE_WIDTH = 110


def plan(
    *,
    load: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="load [L, E]: .safetensors or .npz with `load`, .parquet, or a routing trace"
        ),
    ],
    servers: Annotated[int, typer.Option(metavar="N", help="expert servers")],
    budget_copies: Annotated[
        int | None, typer.Option(metavar="C", help="live copies allowed in all; default: one of each expert")
    ] = None,
    before: Annotated[
        Path | None, typer.Option("--from", metavar="PLAN.json", help="the copies that are there, from --json")
    ] = None,
    max_moves: Annotated[int | None, typer.Option(metavar="M", help="loads for balance and survival at most")] = None,
    survive: Annotated[int, typer.Option(metavar="K", help="servers whose loss should take no expert away")] = 0,
    server_speeds: Annotated[str, typer.Option(metavar="V,...", help="each server's speed; default: all alike")] = "",
    server_copies: Annotated[str, typer.Option(metavar="C,...", help="copies that each server has room for")] = "",
    as_json: Json = False,
) -> None:
    """Plan which copies live on which of N servers, and say what that gives: balance, copies, moves, risk."""
    with output(as_json=as_json) as out:
        from cluster.loadfile import read_load
        from cluster.planfile import read_plan
        from cluster.run_plan import Wanted, run_plan

        wanted = Wanted(
            servers=servers,
            budget_copies=budget_copies,
            max_moves=max_moves,
            survive=survive,
            speeds=tuple(_numbers("--server-speeds", server_speeds, float)),
            server_copies=tuple(_numbers("--server-copies", server_copies, int)),
        )
        found = read_load(load)
        document = {"load": str(load)} | run_plan(
            found, wanted, before=None if before is None else read_plan(before, found)
        )
        out.document(document)
        if not as_json:
            out.line(_table(document, replanned=before is not None))


def _numbers(option: str, text: str, kind: type[float] | type[int]) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")] if text else []
    except ValueError:
        raise bad_input(f"{option} is {text!r}, expected one number for each server with commas between") from None


def _table(document: dict[str, Any], *, replanned: bool) -> str:
    """The plan for people: a line for each layer, and the sums."""
    from io import StringIO

    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_footer=True)
    table.add_column("layer", "all")
    sums = (
        ("balancedness", f"{document['worst_balancedness']:.3f} at worst"),
        ("copies", f"{document['num_copies']:,}"),
        ("extra", f"{document['extra_copies']:,}"),
        ("moved", f"{document['moved_copies']:,}" if replanned else "-"),
        ("per server", _span(document["copies_per_server"])),
        ("single copies", f"{document['single_copy_experts']:,}"),
        ("mass at risk", f"{document['mass_at_risk']:.2%}"),
    )
    for name, total in sums:
        table.add_column(name, total, justify="right", no_wrap=True)
    for layer in document["layers"]:
        table.add_row(
            layer["layer"],
            f"{layer['balancedness']:.3f}",
            f"{layer['copies']:,}",
            f"{layer['extra_copies']:,}",
            f"{layer['moved_copies']:,}" if replanned else "-",
            _span(layer["copies_per_server"]),
            f"{len(layer['single_copy_experts']):,}",
            f"{layer['mass_at_risk']:.2%}",
        )
    text = StringIO()
    Console(file=text, width=_TABLE_WIDTH).print(table)
    lost = max(1, document["survive"])
    return (
        text.getvalue().rstrip("\n")
        + f"\n{document['num_layers']} layers of {document['num_experts']} experts on {document['num_servers']} servers"
        + f", mean balancedness {document['mean_balancedness']:.3f}; mass at risk: gate mass without a copy after the "
        + f"loss of the worst {'server' if lost == 1 else f'{lost} servers'}"
    )


def _span(counts: list[int]) -> str:
    return f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,}-{max(counts):,}"
