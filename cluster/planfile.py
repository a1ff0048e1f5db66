"""A plan of `expertmesh plan` as a document: what it says of every layer, and reading one back.

Servers are numbered, layers are rows of the load matrix.

Shapes: L layers, E experts, S servers, C copies.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.loadfile import LoadFile
from cluster.messages import Key
from protos.errors import InvalidRequest
from router.table import CopyShare

MAX_SERVERS = 65536

Copies = Mapping[Key, tuple[CopyShare, ...]]


def describe_plan(
    load: LoadFile, copies: Copies, before: Copies | None, *, speeds: Sequence[float], survive: int
) -> dict[str, Any]:
    """A plan's copies as [layer, expert, server, share], and what each layer gets from them.

    Args:
        before: the copies that those of the plan count as moved against; None: nothing is.
        speeds: of all servers, relative.
        survive: servers whose loss `mass_at_risk` is about, one at least.
    """
    num_layers, num_experts = load.load_LE.shape
    index = {layer: row for row, layer in enumerate(load.layers)}
    entries = sorted(
        [index[layer], expert, server_index(copy.server_id), copy.share]
        for (layer, expert), held in copies.items()
        for copy in held
    )
    layer_C, expert_C, server_C = (np.array([entry[i] for entry in entries], dtype=np.int64) for i in range(3))
    share_C = np.array([entry[3] for entry in entries], dtype=np.float64)
    old = {
        (index[layer], expert, server_index(copy.server_id))
        for (layer, expert), held in (before or {}).items()
        for copy in held
    }
    moved_C = np.array([tuple(entry[:3]) not in old for entry in entries]) if before is not None else layer_C < 0
    speed_S = np.array(speeds)
    count_LE = np.zeros((num_layers, num_experts), dtype=np.int64)
    np.add.at(count_LE, (layer_C, expert_C), 1)
    copies_LS, load_LS, risk_LS = (np.zeros((num_layers, len(speeds))) for _ in range(3))
    np.add.at(copies_LS, (layer_C, server_C), 1)
    np.add.at(load_LS, (layer_C, server_C), share_C * load.load_LE[layer_C, expert_C])
    losses = max(1, survive)
    count_C = count_LE[layer_C, expert_C]
    np.add.at(risk_LS, (layer_C, server_C), np.where(count_C <= losses, load.load_LE[layer_C, expert_C] / count_C, 0.0))
    layers = [
        {
            "layer": load.layers[row],
            "balancedness": _balancedness(load_LS[row], speed_S),
            "copies": int(count_LE[row].sum()),
            "extra_copies": int(count_LE[row].sum()) - num_experts,
            "moved_copies": int(moved_C[layer_C == row].sum()),
            "copies_per_server": copies_LS[row].astype(int).tolist(),
            "single_copy_experts": np.flatnonzero(count_LE[row] == 1).tolist(),
            "mass_at_risk": _risk(risk_LS[row], load.load_LE[row].sum(), losses),
        }
        for row in range(num_layers)
    ]
    balance_L = [layer["balancedness"] for layer in layers]
    return {
        "num_layers": num_layers,
        "num_experts": num_experts,
        "num_servers": len(speeds),
        "num_copies": len(entries),
        "extra_copies": len(entries) - num_layers * num_experts,
        "moved_copies": int(moved_C.sum()),
        "worst_balancedness": min(balance_L),
        "mean_balancedness": sum(balance_L) / num_layers,
        "single_copy_experts": int((count_LE == 1).sum()),
        "mass_at_risk": _risk(risk_LS.sum(axis=0), load.load_LE.sum(), losses),
        "copies_per_server": copies_LS.sum(axis=0).astype(int).tolist(),
        "layers": layers,
        "copies": entries,
    }


def _balancedness(load_S: npt.NDArray[np.float64], speed_S: npt.NDArray[np.float64]) -> float:
    """Mean over maximum server load, per speed; 1 for a layer without load."""
    most = float((load_S / speed_S).max())
    return float(load_S.sum() / speed_S.sum()) / most if most else 1.0


def _risk(risk_S: npt.NDArray[np.float64], total: float, losses: int) -> float:
    """Share of the gate mass that loses its last copy with the worst servers; exact for one, else an upper bound.

    An expert with n copies is lost with n servers only: it counts 1/n of its mass at each of them.
    """
    return float(np.sort(risk_S)[-losses:].sum() / total) if total else 0.0


def read_plan(path: Path, load: LoadFile) -> Copies:
    """The copies of a plan that this command printed; only its `copies` are needed.

    Raises:
        InvalidRequest: no such file, no such document, or the plan of another model.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        entries = document["copies"]
        names = [entry["layer"] for entry in document.get("layers", [])]
        num_experts = document.get("num_experts", load.load_LE.shape[1])
    except OSError as err:
        raise InvalidRequest(f"{path}: cannot be read ({err.strerror})") from err
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise InvalidRequest(f"{path}: not a plan: {type(err).__name__} {err}") from err
    shape = load.load_LE.shape
    if names and (len(names), num_experts) != shape:
        raise InvalidRequest(
            f"{path}: is the plan of another model: {len(names)} layers of {num_experts} experts, the load has "
            f"{shape[0]} layers of {shape[1]}"
        )
    if names and tuple(map(str, names)) != load.layers:
        raise InvalidRequest(
            f"{path}: is the plan of another model: layers {some(names)}, the load has {some(load.layers)}"
        )
    copies: dict[Key, list[CopyShare]] = {}
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        layer, expert, server, share = _entry(path, number, entry, shape)
        held = copies.setdefault((load.layers[layer], expert), [])
        if any(copy.server_id == server_name(server) for copy in held):
            raise InvalidRequest(f"{path}: copies[{number}] is there twice: {entry}")
        held.append(CopyShare(server_id=server_name(server), share=share))
    return {key: tuple(held) for key, held in copies.items()}


def _entry(path: Path, number: int, entry: Any, shape: tuple[int, ...]) -> tuple[int, int, int, float]:
    wrong = InvalidRequest(
        f"{path}: copies[{number}] is {json.dumps(entry)[:80]}, expected [layer, expert, server, share] with layer in "
        f"0..{shape[0] - 1}, expert in 0..{shape[1] - 1}, server in 0..{MAX_SERVERS - 1}, share above 0 up to 1"
    )
    if not isinstance(entry, list) or len(entry) != 4:
        raise wrong
    limits = (*shape, MAX_SERVERS)
    if not all(type(value) is int and 0 <= value < limit for value, limit in zip(entry[:3], limits, strict=True)):
        raise wrong
    if type(entry[3]) not in (int, float) or not 0 < entry[3] <= 1 + 1e-9:
        raise wrong
    layer, expert, server, share = entry
    return layer, expert, server, float(share)


def server_name(server: int) -> str:
    """What the planner knows a numbered server as; names sort as numbers do."""
    return f"{server:05d}"


def server_index(server_id: str) -> int:
    """The number of a server that the planner names."""
    return int(server_id)


def some(values: Sequence[object]) -> str:
    """The first of many values, for a message."""
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
