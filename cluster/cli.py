"""The command line. Scripts are written against it: see `cluster/console.py` for what goes where.

Commands import what they need when they run, so that `--help` and mistakes are answered at once. This is the only
place that reads the environment.
"""

import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cluster.cli_load import load
from cluster.cli_options import Json, Model, Router, StateDir, check_address, read_named_model
from cluster.cli_plan import plan
from cluster.cli_simulate import simulate
from cluster.console import BAD_INPUT, FAILED, INTERRUPTED, CommandError, bad_input, die, interruptible, note, output
from cluster.status_view import status_lines

if TYPE_CHECKING:
    from experts.packed import WeightDtype

app = typer.Typer(
    name="expertmesh",
    help="Serve the experts of a Mixture-of-Experts model as an elastic cluster on Ray.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command()
def layer(
    model: Model,
    *,
    layer: Annotated[str, typer.Option(metavar="I", help="transformer layer the MoE block sits in")],
    input: Annotated[Path, typer.Option(metavar="F", help="safetensors with hidden_states [T, D]")],
    output_path: Annotated[
        Path, typer.Option("--output", metavar="F", help="safetensors to write: output, expert_ids, gate_weights")
    ],
    router: Router = None,
    as_json: Json = False,
) -> None:
    """Run one MoE layer (routed and shared experts) on hidden states from a file."""
    with output(as_json=as_json) as out:
        check_address(router)
        spec = read_named_model(model)
        from cluster.arrays import writable
        from cluster.run_model import run_layer

        document = asyncio.run(
            run_layer(spec, layer, input_path=input, output_path=writable(output_path), router=router)
        )
        out.document(document)
        out.line(f"layer {layer}: {document['tokens']} tokens in {document['seconds']:.3g} s, written to {output_path}")


@app.command()
def verify(
    model: Model,
    *,
    router: Router = None,
    weight_dtype: Annotated[
        str | None,
        typer.Option(metavar="DTYPE", help="pack the experts as int8, int4 or fp8 (a router says what its are)"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare every MoE layer with transformers' own (the model has to fit in memory); status 1 beyond tolerance."""
    with output(as_json=as_json) as out:
        check_address(router)
        spec = read_named_model(model)
        from cluster.run_model import run_verify

        document = asyncio.run(
            run_verify(
                spec,
                router=router,
                weight_dtype=_weight_dtype(weight_dtype),
                on_layer=lambda error, tolerance: out.line(
                    f"layer {error.layer:>3}  max relative error {error.error:.2e}  rms {error.rms_error:.2e}  "
                    f"{'ok' if error.error <= tolerance else f'BEYOND {tolerance:.0e}'}"
                ),
            )
        )
        out.document(document)
        where = f"router {router}" if router else "this process"
        out.line(
            f"largest {document['largest_error']:.2e}, tolerance {document['tolerance']:.0e} ({spec.dtype}, {where})"
        )
        if not document["ok"]:
            raise CommandError(
                f"largest relative error {document['largest_error']:.2e} exceeds {document['tolerance']:.0e}"
            )


@app.command()
def describe(
    model: Model,
    *,
    servers: Annotated[int | None, typer.Option(metavar="N", help="plan so many; default: 1, 2, 4 to 32")] = None,
    budget_bytes: Annotated[int | None, typer.Option(metavar="B", help="each server's memory for copies")] = None,
    weight_dtype: Annotated[Literal["compute", "int8", "int4", "fp8"], typer.Option(help="in memory")] = "compute",
    compute_dtype: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option(help="default: float32 for float32 models, else bfloat16")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a model is, without reading weights: layers, gate in words, bytes, what N servers would hold."""
    with output(as_json=as_json) as out:
        from cluster.describe import SERVER_COUNTS, describe_model
        from cluster.describe_view import describe_lines
        from cluster.models import find_model

        document = describe_model(
            find_model(model),
            servers=SERVER_COUNTS if servers is None else (servers,),
            budget_bytes=budget_bytes,
            weight_dtype=weight_dtype,
            compute_dtype=compute_dtype,
        )
        out.document(document)
        out.line("\n".join(describe_lines(document)))


app.command()(load)
app.command()(plan)
app.command()(simulate)


@app.command()
def up(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG.yaml]", help="cluster to deploy")] = None,
    *,
    model: Annotated[str | None, typer.Option(metavar="DIR", help="model to serve, instead of the file's")] = None,
    servers: Annotated[int | None, typer.Option(metavar="N", help="expert servers to start with, and at least")] = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="A", envvar="RAY_ADDRESS", help="Ray to deploy on (host:port or auto); none: a local one"),
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="return once ready, instead of staying until Ctrl-C")
    ] = False,
    as_json: Json = False,
    state_dir: StateDir = None,
) -> None:
    """Deploy a cluster, wait until it is ready, print its status; Ctrl-C or `expertmesh down` stops it."""
    with output(as_json=as_json) as out, interruptible():
        from cluster import run_cluster

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        folder = _state_dir(state_dir)
        wanted = run_cluster.read_config(config, model=model, servers=servers)
        found = run_cluster.up(wanted, address=address, folder=folder, on_progress=note)
        out.document(found)
        for line in status_lines(found):
            out.line(line)
        if detach:
            return
        note("ready; Ctrl-C stops it")
        try:
            run_cluster.wait_until_down(folder)
        except KeyboardInterrupt:
            note(run_cluster.down(folder))


@app.command()
def status(*, as_json: Json = False, state_dir: StateDir = None) -> None:
    """Show the cluster that is up."""
    with output(as_json=as_json) as out:
        from cluster.run_cluster import find_status

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        found = find_status(_state_dir(state_dir))
        out.document(found)
        for line in status_lines(found):
            out.line(line)


@app.command()
def down(*, state_dir: StateDir = None) -> None:
    """Stop what `up` deployed, and the local Ray it started; nothing else."""
    with output(as_json=False) as out:
        from cluster import run_cluster

        out.line(run_cluster.down(_state_dir(state_dir)))


@app.command()
def demo(
    *,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="write the summary as a JSON document")
    ] = None,
    picture: Annotated[Path, typer.Option(metavar="FILE", help="write the picture (PNG)")] = Path(
        "expertmesh-demo.png"
    ),
) -> None:
    """Run a small real model under skewed load on this machine: scale up, kill a server, scale down; 1-3 minutes."""
    with interruptible():
        from rich.console import Console

        from cluster.demo_settings import Settings
        from cluster.run_demo import run_demo

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        root = Path(__file__).parent.parent
        console = Console(width=None if sys.stdout.isatty() else 120)
        if not run_demo(Settings(), root, json_file=json_file, picture=picture, console=console):
            raise CommandError("a promise was broken, see above")


def main() -> None:
    """The `expertmesh` command: whatever goes wrong is one line on standard error and a status."""
    try:
        status = app(standalone_mode=False)
    except Exception as err:
        _report(err)
    except KeyboardInterrupt:
        die("interrupted", INTERRUPTED)
    if status == INTERRUPTED:  # typer takes Ctrl-C for an end like any other
        die("interrupted", INTERRUPTED)
    sys.exit(status if isinstance(status, int) else 0)


def _report(err: Exception) -> None:
    """Turn an exception into the contract's line and status; a bug of ours keeps its traceback."""
    if isinstance(err, CommandError):
        die(str(err), err.status)
    if hasattr(err, "format_message"):  # click's usage errors, whose classes typer keeps to itself
        die(f"{err.format_message()} (see expertmesh --help)", BAD_INPUT)
    if isinstance(err, typer.Abort):
        die("interrupted", INTERRUPTED)
    from protos.errors import CorruptWeights, ExpertmeshError, InvalidRequest

    if isinstance(err, ExpertmeshError):
        die(err.message, BAD_INPUT if isinstance(err, InvalidRequest | CorruptWeights) else FAILED)
    if isinstance(err, OSError):
        die(str(err), FAILED)
    raise err


def _weight_dtype(given: str | None) -> "WeightDtype | None":
    from cluster.verify import packed_dtype

    packed = None if given is None else packed_dtype(given)
    if packed is None and given is not None:
        raise bad_input(f"--weight-dtype is {given!r}, expected int8, int4 or fp8")
    return packed


def _state_dir(given: Path | None) -> Path:
    """A directory of this user's, as the XDG base directory specification has it."""
    return given or Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "expertmesh"


if __name__ == "__main__":
    main()
