"""What `expertmesh up` left standing: a small file per user, so that `status` and `down` find it, and only it."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.local import LocalRay

FILE = "cluster.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A cluster that is up, or was being brought up."""

    name: str  # of the Serve application
    address: str  # host:port of Ray's GCS
    local_ray: LocalRay | None  # the Ray that `up` started; None: it found one
    started_by: int  # pid of `up`

    @property
    def alive(self) -> bool:
        """Whether it may still be there; of a Ray that is not ours nothing is known."""
        return self.local_ray is None or bool(self.local_ray.pids())


def save(standing: Standing, folder: Path) -> None:
    """Remember a cluster; whoever reads meanwhile sees the old file or the new one."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = folder / f".{FILE}.{os.getpid()}"
    partial.write_text(json.dumps(asdict(standing), default=str))
    partial.replace(folder / FILE)


def load(folder: Path) -> Standing | None:
    """The cluster that is remembered; None if there is none, or its file is damaged."""
    try:
        data: dict[str, Any] = json.loads((folder / FILE).read_text())
        local = data.pop("local_ray")
        ray = None if local is None else LocalRay(**(local | {"temp_dir": Path(local["temp_dir"])}))
        return Standing(**data, local_ray=ray)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def forget(folder: Path) -> None:
    """Remove the file."""
    (folder / FILE).unlink(missing_ok=True)
