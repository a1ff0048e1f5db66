"""What every result says beside its numbers: the command, the versions, the machine and the commit."""

import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.processes import ROOT


def publish(found: Mapping[str, Any], *, packages: Sequence[str], out: Path | None) -> None:
    """Print a result and, if `out` is given, write it there as JSON.

    Args:
        found: the numbers; its `machine` adds to what is said of the machine.
        packages: whose versions matter.
    """
    git = ["git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    document = {
        "command": " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *_without_out(sys.argv[1:])]),
        **found,
        "versions": {name: version(name) for name in packages},
        "machine": {
            "python": platform.python_version(),
            "cores": psutil.cpu_count(),
            "cpu": platform.machine(),
            **found.get("machine", {}),
        },
        "commit": subprocess.run(git, capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip(),
    }
    text = json.dumps(document, indent=1, default=float)
    print(text)
    if out:
        out.write_text(text + "\n")


def _without_out(arguments: Sequence[str]) -> Iterator[str]:
    """Where a result went is nobody's business."""
    rest = iter(arguments)
    for argument in rest:
        if argument == "--out":
            next(rest, None)
        elif not argument.startswith("--out="):
            yield argument
