"""Routing traces as Parquet files: the columns, what a file says about itself, and writing one.

A row is one token in one layer. `cluster/traces.py` reads them; routers (`router/recorder.py`) and load generators
write them.

| column | type | what it is |
|---|---|---|
| `time_s` | float64 | when it was routed, Unix seconds; synthetic traces may begin anywhere |
| `layer` | string | MoE layer name |
| `token` | int64 | running number in the writer's stream of that layer; with sampling there are gaps |
| `expert_ids` | list of int32 | -1: none (dropped, or left out by the model); from `num_experts` on: identity experts |
| `weights` | list of float32 | gate weights, 0 where there is no expert |

Shapes: T tokens of a block, K experts per token.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

VERSION = 1
METADATA_KEY = b"expertmesh.trace"  # of the Parquet file's key-value metadata: a TraceInfo as JSON, and the version
ROW_GROUP_TOKENS = 65536
MAX_BYTES = 1 << 30  # of one file

SCHEMA = pa.schema(
    [
        pa.field("time_s", pa.float64(), nullable=False),
        pa.field("layer", pa.string(), nullable=False),
        pa.field("token", pa.int64(), nullable=False),
        pa.field("expert_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("weights", pa.list_(pa.float32()), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceInfo:
    """What a trace says about itself.

    Args:
        model: where its weights were, or its name.
        layers: MoE layers in model order, also those without a row.
        num_experts: routed experts per layer; ids from here to `num_choices` are identity experts.
        top_k: experts per token.
        sampled_share: of the tokens that passed, so many are in the trace, 0..1.
        stage: the routing before the overflow policy (`gate`), or what was computed after it (`effective`).
    """

    model: str
    layers: tuple[str, ...]
    num_experts: int
    num_choices: int
    top_k: int
    sampled_share: float = 1.0
    stage: Literal["gate", "effective"] = "gate"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoutedTokens:
    """Tokens of one layer that were routed at the same time."""

    time_s: float
    layer: str
    token_T: npt.NDArray[np.int64]
    expert_TK: npt.NDArray[np.int32]
    weight_TK: npt.NDArray[np.float32]


class TraceWriter:
    """Writes one trace file. It has its name once it is whole: `close` gives it, an error takes everything away.

    Args:
        max_bytes: what comes once the file is this long is left out (`num_left_out`).

    Raises:
        OSError: the file cannot be written, now or later; the disk may be full.
    """

    def __init__(self, path: Path, info: TraceInfo, *, max_bytes: int = MAX_BYTES) -> None:
        self.path = path
        self.num_tokens = 0
        self.num_left_out = 0
        self._max_bytes = max_bytes
        self._partial = path.with_name(f".{path.name}.partial")
        document = json.dumps({"version": VERSION} | asdict(info)).encode()
        self._file = self._partial.open("wb")
        self._parquet = pq.ParquetWriter(self._file, SCHEMA.with_metadata({METADATA_KEY: document}), compression="zstd")

    def __enter__(self) -> "TraceWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.discard()

    def write(self, blocks: Sequence[RoutedTokens]) -> None:
        """Append tokens, in row groups of at most ROW_GROUP_TOKENS."""
        num_tokens = sum(len(block.token_T) for block in blocks)
        if not num_tokens:
            return
        try:
            if self._file.tell() >= self._max_bytes:
                self.num_left_out += num_tokens
                return
            self._parquet.write_table(_table(blocks), row_group_size=ROW_GROUP_TOKENS)
            self.num_tokens += num_tokens
        except OSError:
            self.discard()
            raise

    def close(self) -> None:
        """Finish the file and give it its name."""
        try:
            self._parquet.close()
            self._file.close()
            self._partial.replace(self.path)
        except OSError:
            self.discard()
            raise

    def discard(self) -> None:
        """Give up: nothing stays."""
        self._parquet.is_open = False  # else it would try to write the end of the file when it is collected
        with suppress(OSError):  # what Python still has in its buffer does not fit either
            self._file.close()
        self._partial.unlink(missing_ok=True)


def _table(blocks: Sequence[RoutedTokens]) -> pa.Table:
    """The blocks' tokens as rows."""
    count_B = [len(block.token_T) for block in blocks]
    width_T = np.repeat([block.expert_TK.shape[1] for block in blocks], count_B)
    first_T = pa.array(np.concatenate([[0], np.cumsum(width_T)]).astype(np.int32))
    names = sorted({block.layer for block in blocks})
    layer_B = [names.index(block.layer) for block in blocks]
    layers = pa.DictionaryArray.from_arrays(pa.array(np.repeat(layer_B, count_B).astype(np.int32)), pa.array(names))
    return pa.Table.from_arrays(
        [
            pa.array(np.repeat([block.time_s for block in blocks], count_B)),
            layers.dictionary_decode(),
            pa.array(np.concatenate([block.token_T for block in blocks])),
            pa.ListArray.from_arrays(first_T, pa.array(np.concatenate([block.expert_TK.ravel() for block in blocks]))),
            pa.ListArray.from_arrays(first_T, pa.array(np.concatenate([block.weight_TK.ravel() for block in blocks]))),
        ],
        schema=SCHEMA,
    )
