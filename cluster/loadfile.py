"""Load matrices from files: `load` [L, E] in safetensors or .npz, a Parquet table, or a routing trace.

A Parquet table has one of these forms: columns `layer`, `expert`, `load`; a column `load` of lists, one row per layer;
or one column of numbers per expert, one row per layer. The last two may have a column `layer` with names.

Shapes: L layers, E experts.
"""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from protos.errors import InvalidRequest

KEY = "load"
MAX_CELLS = 1 << 24  # of a matrix: 65,536 layers of 256 experts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadFile:
    """The load of a model: `load_LE` in any unit, and the names of its layers ("0", "1", ... where none are known)."""

    layers: tuple[str, ...]
    load_LE: npt.NDArray[np.float64]


def read_load(path: Path) -> LoadFile:
    """Read a load matrix; its form follows from the file's name and contents.

    Raises:
        InvalidRequest: no such file, another format, dtype or shape, a negative or non-finite value; names file, value
            and limit.
    """
    if not path.exists():
        raise InvalidRequest(f"{path}: no such file")
    layers: tuple[str, ...] | None = None
    if path.is_dir() or path.suffix == ".parquet":
        layers, load_LE = _from_parquet(path)
    elif path.suffix == ".npz":
        load_LE = _from_npz(path)
    elif path.suffix == ".safetensors":
        load_LE = _from_safetensors(path)
    else:
        raise InvalidRequest(f"{path}: not named .safetensors, .npz or .parquet, which a load matrix can be")
    return _checked(path, load_LE, layers)


def _checked(path: Path, load_LE: npt.NDArray[np.generic], layers: tuple[str, ...] | None) -> LoadFile:
    if load_LE.dtype.kind not in "fiu":
        raise InvalidRequest(f"{path}: {KEY} has dtype {load_LE.dtype}, expected floating point or integers")
    if load_LE.ndim != 2 or not load_LE.size or load_LE.size > MAX_CELLS:
        raise InvalidRequest(
            f"{path}: {KEY} has shape {list(load_LE.shape)}, expected [L, E] with 1 to {MAX_CELLS} elements"
        )
    value_LE = load_LE.astype(np.float64)
    bad_LE = ~np.isfinite(value_LE) | (value_LE < 0)
    if bad_LE.any():
        layer, expert = np.argwhere(bad_LE)[0].tolist()
        raise InvalidRequest(f"{path}: {KEY}[{layer}, {expert}] is {value_LE[layer, expert]}, it must be 0 or more")
    return LoadFile(layers=layers or tuple(map(str, range(len(value_LE)))), load_LE=value_LE)


def _from_npz(path: Path) -> npt.NDArray[np.generic]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            if KEY not in arrays.files:
                raise InvalidRequest(f"{path}: no key {KEY!r} (it has {', '.join(arrays.files) or 'none'})")
            found: npt.NDArray[np.generic] = arrays[KEY]
            return found
    except (zipfile.BadZipFile, zlib.error, ValueError, TypeError, OSError, EOFError) as err:
        raise InvalidRequest(f"{path}: not a readable .npz file ({err})") from err


def _from_safetensors(path: Path) -> npt.NDArray[np.generic]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            if KEY not in (names := list(file.keys())):
                raise InvalidRequest(f"{path}: no key {KEY!r} (it has {', '.join(names) or 'none'})")
            dtype = file.get_slice(KEY).get_dtype()
            if dtype not in ("F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8"):
                raise InvalidRequest(f"{path}: {KEY} has dtype {dtype}, expected F64, F32, F16 or integers")
            found: npt.NDArray[np.generic] = file.get_tensor(KEY)
            return found
    except (SafetensorError, OSError) as err:
        raise InvalidRequest(f"{path}: not a readable safetensors file ({err})") from err


def _from_parquet(path: Path) -> tuple[tuple[str, ...] | None, npt.NDArray[np.generic]]:
    from cluster.columns import is_float_list, is_int_list, read_schema
    from cluster.traces import RoutingTrace, is_trace, load_matrix

    if path.is_dir() or is_trace(schema := read_schema(path)):
        trace = RoutingTrace(path)
        [(_, load_LE)] = load_matrix(trace)
        return trace.info.layers, load_LE
    if {"layer", "expert", KEY} <= set(schema.names):
        return _from_cells(path)
    if KEY in schema.names:
        kind = schema.field(KEY).type
        if not is_float_list(kind) and not is_int_list(kind):
            raise InvalidRequest(f"{path}: column {KEY} has type {kind}, expected a list of numbers for each layer")
    return _from_rows(path, [KEY] if KEY in schema.names else None)


def _from_cells(path: Path) -> tuple[tuple[str, ...], npt.NDArray[np.float64]]:
    """A table with a row per expert."""
    from cluster.columns import read_chunks

    layers: dict[str, int] = {}
    found: dict[tuple[int, int], float] = {}
    for chunk in read_chunks(path, ["layer", "expert", KEY]):
        expert_T = chunk.ints("expert")
        if (expert_T < 0).any() or (expert_T >= MAX_CELLS).any():
            raise chunk.error("expert", (expert_T < 0) | (expert_T >= MAX_CELLS), f"limit is 0..{MAX_CELLS - 1}")
        rows = zip(chunk.text("layer").to_pylist(), expert_T.tolist(), chunk.floats(KEY).tolist(), strict=True)
        for number, (layer, expert, load) in enumerate(rows):
            key = (layers.setdefault(layer, len(layers)), expert)
            if key in found:
                raise InvalidRequest(
                    f"{path}: layer {layer}, expert {expert} is there again in row {chunk.row + number}"
                )
            found[key] = load
    num_experts = max((expert for _, expert in found), default=-1) + 1
    if len(layers) * num_experts > MAX_CELLS:
        raise InvalidRequest(f"{path}: {len(layers)} layers of {num_experts} experts exceed {MAX_CELLS} elements")
    load_LE = np.zeros((len(layers), num_experts))
    for key, load in found.items():
        load_LE[key] = load
    return tuple(layers), load_LE


def _from_rows(path: Path, columns: list[str] | None) -> tuple[tuple[str, ...] | None, npt.NDArray[np.float64]]:
    """A table with a row per layer: its loads in one column of lists, or (None) in one column per expert."""
    import pyarrow as pa

    from cluster.columns import read_chunks, read_schema

    schema = read_schema(path)
    names = columns or [name for name in schema.names if name != "layer" and not name.startswith("__index_level_")]
    for name in names:
        kind = schema.field(name).type
        if columns is None and not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
            raise InvalidRequest(
                f"{path}: column {name} has type {kind}, expected numbers, or columns of a routing trace"
            )
    layers: list[str] = []
    rows: list[npt.NDArray[np.float64]] = []
    for chunk in read_chunks(path, [*names, *(["layer"] if "layer" in schema.names else [])]):
        if "layer" in schema.names:
            layers += chunk.text("layer").to_pylist()
        if columns is None:
            rows += list(np.stack([chunk.floats(name) for name in names], axis=1)) if names else []
        else:
            first_T1, load_P = chunk.lists(KEY, pa.float64())
            rows += np.split(load_P, first_T1[1:-1])
    if len({len(row) for row in rows}) > 1:
        raise InvalidRequest(
            f"{path}: {KEY} has layers of {sorted({len(row) for row in rows})} experts, expected one E"
        )
    if len(set(layers)) != len(layers):
        raise InvalidRequest(f"{path}: layer has {len(layers)} rows but {len(set(layers))} names")
    return tuple(layers) or None, np.stack(rows) if rows else np.zeros((0, 0))
