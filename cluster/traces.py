"""Routing traces: reading them batch by batch, and the load they put on each expert over time.

The format is that of `protos/tracefile.py`. Files that others made may be without our metadata; then layers, experts
and K are taken from the rows, and every token is taken to be there.

Shapes: T tokens of a batch, P their pairs, L layers, E experts, W windows.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.columns import Chunk, is_float_list, is_int_list, is_text, read_chunks, read_schema
from protos.errors import InvalidRequest
from protos.tracefile import METADATA_KEY, VERSION, TraceInfo

MAX_MATRIX_BYTES = 1 << 30  # of all windows of `load_matrix` together

_COLUMNS = {
    "time_s": ("float64", lambda kind: pa.types.is_floating(kind) or pa.types.is_integer(kind)),
    "layer": ("string", is_text),
    "token": ("int64", pa.types.is_integer),
    "expert_ids": ("list<int32>", is_int_list),
    "weights": ("list<float32>", is_float_list),
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TraceBatch:
    """Consecutive rows of a trace. Token t has the pairs first_T1[t] to first_T1[t + 1]."""

    time_s_T: npt.NDArray[np.float64]
    layer_T: npt.NDArray[np.int64]  # index into the trace's layers
    token_T: npt.NDArray[np.int64]
    first_T1: npt.NDArray[np.int64]
    expert_P: npt.NDArray[np.int32]
    weight_P: npt.NDArray[np.float32]

    def rows(self) -> npt.NDArray[np.int64]:
        """The token of this batch that each pair belongs to [P]."""
        return np.repeat(np.arange(len(self.token_T)), np.diff(self.first_T1))


class RoutingTrace:
    """A trace on disk: one file, or a directory with what routers have recorded.

    Raises:
        InvalidRequest: no such file, no Parquet, a column that is missing or of another type, files that do not belong
            together; while reading: a value out of its range. Names file, column, value and limit.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = tuple(sorted(path.glob("*.parquet"))) if path.is_dir() else (path,)
        if not self.files:
            raise InvalidRequest(f"{path}: no *.parquet file in this directory")
        infos = [_check_file(file) for file in self.files]
        for file, info in zip(self.files, infos, strict=True):
            if info != infos[0]:
                raise InvalidRequest(f"{file}: is not of the same trace as {self.files[0].name}: {info}, {infos[0]}")
        self._declared = infos[0]

    @cached_property
    def info(self) -> TraceInfo:
        """What the trace says about itself, or what its rows say.

        Raises:
            InvalidRequest: it says nothing and has no rows with experts.
        """
        return self._declared or self._inferred()

    @cached_property
    def num_tokens(self) -> int:
        """Rows."""
        return sum(pq.read_metadata(file).num_rows for file in self.files)

    @cached_property
    def span_s(self) -> tuple[float, float]:
        """The earliest and the latest time.

        Raises:
            InvalidRequest: there is no row.
        """
        first_s, last_s = math.inf, -math.inf
        for file in self.files:
            for chunk in read_chunks(file, ["time_s"]):
                time_s_T = chunk.floats("time_s")
                first_s, last_s = min(first_s, float(time_s_T.min())), max(last_s, float(time_s_T.max()))
        if first_s > last_s:
            raise InvalidRequest(f"{self.path}: has no rows")
        return first_s, last_s

    def batches(self) -> Iterator[TraceBatch]:
        """All rows in the order of the files, some ten thousand at a time."""
        info = self.info
        names = pa.array(info.layers)
        for file in self.files:
            for chunk in read_chunks(file, list(_COLUMNS)):
                layer_T = pc.index_in(chunk.text("layer"), names)
                if layer_T.null_count:
                    raise chunk.error("layer", pc.is_null(layer_T), f"the trace's layers are {', '.join(info.layers)}")
                first_T1, expert_P = chunk.lists("expert_ids", pa.int32())
                weight_first_T1, weight_P = chunk.lists("weights", pa.float32())
                if (first_T1 != weight_first_T1).any():
                    uneven_T = np.diff(first_T1) != np.diff(weight_first_T1)
                    raise chunk.error("weights", uneven_T, "it must have as many elements as expert_ids")
                _check_pairs(chunk, info, first_T1, expert_P, weight_P)
                yield TraceBatch(
                    time_s_T=chunk.floats("time_s"),
                    layer_T=layer_T.to_numpy().astype(np.int64),
                    token_T=chunk.ints("token"),
                    first_T1=first_T1,
                    expert_P=expert_P,
                    weight_P=weight_P,
                )

    def _inferred(self) -> TraceInfo:
        layers: set[str] = set()
        highest, top_k = -1, 0
        for file in self.files:
            for chunk in read_chunks(file, ["layer", "expert_ids"]):
                layers |= set(chunk.text("layer").unique().to_pylist())
                first_T1, expert_P = chunk.lists("expert_ids", pa.int32())
                highest = max(highest, int(expert_P.max(initial=-1)))
                top_k = max(top_k, int(np.diff(first_T1).max(initial=0)))
        if highest < 0:
            raise InvalidRequest(f"{self.path}: has no rows with experts")
        return TraceInfo(
            model="",
            layers=tuple(sorted(layers, key=_natural)),
            num_experts=highest + 1,
            num_choices=highest + 1,
            top_k=top_k,
        )


def load_matrix(trace: RoutingTrace, window_s: float | None = None) -> list[tuple[float, npt.NDArray[np.float64]]]:
    """The load of each expert over time: for every window its first second and load [L, E] in routed pairs/s.

    Pairs are scaled up by the sampled share; those without an expert server (dropped, identity experts) are no load.
    The last window is measured over the part that the trace covers; if that is less than half of it and there are
    others, it is left out.

    Args:
        window_s: length of the windows, from the first row on; None: one for the whole trace. A trace of a single
            moment is taken for one window of load, or one second.

    Raises:
        InvalidRequest: window_s is not above 0, or so short that the matrices exceed MAX_MATRIX_BYTES; see
            RoutingTrace.
    """
    if window_s is not None and not 0 < window_s < math.inf:
        raise InvalidRequest(f"window_s is {window_s}, it must be above 0")
    first_s, last_s = trace.span_s
    length_s = window_s or (last_s - first_s) or 1.0
    num_windows = 1 if window_s is None else int((last_s - first_s) / length_s) + 1
    num_layers, num_experts = len(trace.info.layers), trace.info.num_experts
    num_bytes = num_windows * num_layers * num_experts * 8
    if num_bytes > MAX_MATRIX_BYTES:
        raise InvalidRequest(
            f"window_s is {length_s:g}: {num_windows} windows of {num_layers} layers with {num_experts} experts take "
            f"{num_bytes} bytes, limit is {MAX_MATRIX_BYTES}"
        )
    pairs_WN = np.zeros((num_windows, num_layers * num_experts))
    for batch in trace.batches():
        window_T = np.minimum(((batch.time_s_T - first_s) / length_s).astype(np.int64), num_windows - 1)
        token_P = batch.rows()
        served_P = (batch.expert_P >= 0) & (batch.expert_P < num_experts)
        slot_P = (batch.layer_T[token_P] * num_experts + batch.expert_P)[served_P]
        window_P = window_T[token_P][served_P]
        for window in np.unique(window_P).tolist():
            pairs_WN[window] += np.bincount(slot_P[window_P == window], minlength=pairs_WN.shape[1])
    rest_s = last_s - first_s - (num_windows - 1) * length_s
    if num_windows > 1 and rest_s < length_s / 2:
        num_windows, rest_s = num_windows - 1, length_s
    length_W = np.full(num_windows, length_s)
    length_W[-1] = rest_s or length_s
    load_WN = pairs_WN[:num_windows] / length_W[:, None] / trace.info.sampled_share
    load_WLE = load_WN.reshape(num_windows, num_layers, num_experts)
    return [(first_s + window * length_s, load_WLE[window]) for window in range(num_windows)]


def check_windows(trace: RoutingTrace, *, window_s: float, numbers: int) -> None:
    """Refuse a trace whose windows do not fit into memory: a single wrong time makes it span years.

    Args:
        numbers: that every window has, 8 bytes each.

    Raises:
        InvalidRequest: they exceed MAX_MATRIX_BYTES, or there is no row.
    """
    first_s, last_s = trace.span_s
    num_windows = int((last_s - first_s) / window_s) + 1
    if num_windows * numbers * 8 > MAX_MATRIX_BYTES:
        raise InvalidRequest(
            f"{trace.path}: time_s spans {last_s - first_s:g} s: {num_windows} windows of {window_s:g} s take "
            f"{num_windows * numbers * 8} bytes, limit is {MAX_MATRIX_BYTES}"
        )


def is_trace(schema: pa.Schema) -> bool:
    """Whether a file with these columns is a routing trace."""
    return "expert_ids" in schema.names


def _check_file(path: Path) -> TraceInfo | None:
    """What a file says about itself; its columns are there and of the right types."""
    schema = read_schema(path)
    for name, (expected, fits) in _COLUMNS.items():
        if name not in schema.names:
            raise InvalidRequest(f"{path}: no column {name!r} (it has {', '.join(schema.names) or 'none'})")
        if not fits(schema.field(name).type):
            raise InvalidRequest(f"{path}: column {name} has type {schema.field(name).type}, expected {expected}")
    document = (schema.metadata or {}).get(METADATA_KEY)
    return None if document is None else _read_info(path, document)


def _read_info(path: Path, document: bytes) -> TraceInfo:
    try:
        fields: dict[str, Any] = json.loads(document)
        if (version := fields.pop("version")) != VERSION:
            raise InvalidRequest(f"{path}: schema version is {version}, supported is {VERSION}")
        info = TraceInfo(**(fields | {"layers": tuple(fields["layers"])}))
        usable = 0 < info.sampled_share <= 1 and 1 <= info.num_experts <= info.num_choices and info.layers
    except (ValueError, TypeError, KeyError, AttributeError) as err:
        raise InvalidRequest(f"{path}: metadata {METADATA_KEY.decode()} cannot be used ({err!r})") from err
    if not usable:
        raise InvalidRequest(f"{path}: metadata {METADATA_KEY.decode()} cannot be used: {info}")
    return info


def _check_pairs(
    chunk: Chunk,
    info: TraceInfo,
    first_T1: npt.NDArray[np.int64],
    expert_P: npt.NDArray[np.int32],
    weight_P: npt.NDArray[np.float32],
) -> None:
    limit = info.num_choices - 1
    for name, bad_P, words in (
        ("expert_ids", (expert_P < -1) | (expert_P > limit), f"limit is 0..{limit}, or -1 for no expert"),
        ("weights", ~np.isfinite(weight_P), "they must be finite"),
    ):
        if bad_P.any():
            bad_T = np.arange(len(first_T1) - 1) == np.searchsorted(first_T1, bad_P.argmax(), side="right") - 1
            raise chunk.error(name, bad_T, words)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts "2" before "10" and "decoder.3" before "encoder.1"."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name) if part]
