"""Columns of Parquet files, read chunk by chunk and checked: errors name file, column, row and value.

Shapes: T rows of a chunk, P elements of their lists.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from protos.errors import InvalidRequest

CHUNK_ROWS = 65536


def read_schema(path: Path) -> pa.Schema:
    """The columns of a file, and its metadata.

    Raises:
        InvalidRequest: there is no such file, or it is no Parquet.
    """
    if not path.is_file():
        raise InvalidRequest(f"{path}: no such file")
    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as err:
        raise InvalidRequest(f"{path}: not a readable Parquet file ({err})") from err


def read_chunks(path: Path, columns: Sequence[str]) -> Iterator["Chunk"]:
    """These columns of one file, at most CHUNK_ROWS at a time.

    Raises:
        InvalidRequest: a value is null, or the file is damaged.
    """
    row = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=CHUNK_ROWS, columns=list(columns)):
                chunk = Chunk(path=path, row=row, batch=batch)
                for name in columns:
                    if batch[name].null_count:
                        raise chunk.error(name, pc.is_null(batch[name]), "it must not be null")
                if batch.num_rows:
                    yield chunk
                row += batch.num_rows
    except (pa.ArrowException, OSError) as err:
        raise InvalidRequest(f"{path}: row {row} and after cannot be read ({err})") from err


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chunk:
    """Some rows of a file, of which `row` is the first."""

    path: Path
    row: int
    batch: pa.RecordBatch

    def floats(self, name: str) -> npt.NDArray[np.float64]:
        """A column of finite numbers [T]."""
        value_T: npt.NDArray[np.float64] = self._cast(self.batch[name], name, pa.float64())
        if not np.isfinite(value_T).all():
            raise self.error(name, ~np.isfinite(value_T), "it must be finite")
        return value_T

    def ints(self, name: str) -> npt.NDArray[np.int64]:
        """A column of integers [T]."""
        value_T: npt.NDArray[np.int64] = self._cast(self.batch[name], name, pa.int64())
        return value_T

    def text(self, name: str) -> pa.Array:
        """A column of text."""
        return self.batch[name].cast(pa.string())

    def lists(self, name: str, kind: pa.DataType) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
        """(first element of each row and the end [T + 1], the elements of all rows [P]) of a column of lists."""
        flat = self.batch[name].flatten()
        if flat.null_count:
            raise InvalidRequest(f"{self.path}: {name} has a null among rows {self.row} and after")
        counts_T = pc.list_value_length(self.batch[name]).to_numpy(zero_copy_only=False)
        return np.concatenate([[0], np.cumsum(counts_T, dtype=np.int64)]), self._cast(flat, name, kind)

    def error(self, name: str, bad_T: Any, limit: str) -> InvalidRequest:
        """What to raise for the first row of a column that is bad."""
        at = int(np.argmax(bad_T))
        return InvalidRequest(
            f"{self.path}: {name} is {self.batch[name][at].as_py()!r} in row {self.row + at}, {limit}"
        )

    def _cast(self, values: pa.Array, name: str, kind: pa.DataType) -> npt.NDArray[Any]:
        try:
            found: npt.NDArray[Any] = values.cast(kind, safe=pa.types.is_integer(kind)).to_numpy(zero_copy_only=False)
        except pa.ArrowException as err:
            raise InvalidRequest(f"{self.path}: {name} in row {self.row} or after is no {kind} ({err})") from err
        return found


def is_text(kind: pa.DataType) -> bool:
    """Whether a column's type is text, dictionary-encoded or not."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def is_int_list(kind: pa.DataType) -> bool:
    """Whether a column's type is a list of integers."""
    return _is_list(kind) and bool(pa.types.is_integer(kind.value_type))


def is_float_list(kind: pa.DataType) -> bool:
    """Whether a column's type is a list of floating-point numbers."""
    return _is_list(kind) and bool(pa.types.is_floating(kind.value_type))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))
