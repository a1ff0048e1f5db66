"""What the commands' arguments have in common: how they are spelled, and their checks."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.console import bad_input

Model = Annotated[str, typer.Argument(metavar="MODEL", help="model directory (or hub id)")]
Router = Annotated[str | None, typer.Option("--router", metavar="H:P", help="router endpoint; none: in this process")]
StateDir = Annotated[
    Path | None,
    typer.Option(metavar="DIR", envvar="EXPERTMESH_STATE_DIR", help="where `up` leaves what `status` and `down` need"),
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document on standard output")]


def read_named_model(name: str) -> Any:
    """The ModelSpec of a model named on the command line."""
    from cluster.models import find_model
    from protos.checkpoint import read_model

    return read_model(find_model(name))


def check_address(address: str | None) -> None:
    """Whether `--router` is host:port, or not given."""
    match = re.fullmatch(r"(?:\[[0-9A-Fa-f:.]+\]|[^\s:\[\]/]+):(\d{1,5})", address or "localhost:1")
    if match is None or not 1 <= int(match[1]) <= 65535:
        raise bad_input(f"--router is {address!r}, expected host:port with a port of 1..65535")
