"""Safetensors files on disk: where every tensor of a model directory lies, and reading exactly its bytes.

The index comes from the files' headers alone. Reads are plain positioned file reads into memory that the returned
tensor owns, not mappings: a mapped file that is truncated under us ends the process with SIGBUS, a file read gives an
error, and an expert server keeps its weights long after an operator has replaced the files. Nothing here unpickles.

Format: https://github.com/huggingface/safetensors#format (8 bytes little-endian header length, JSON, tensor bytes).
"""

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from protos.errors import CorruptWeights, UnsupportedModel
from protos.pages import paged_tensors
from protos.quantised import PIECE_DTYPES

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2} | {
    "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8
}  # fmt: skip
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{1,6})-of-(?P<total>\d{1,6})\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """One safetensors file as it was when its header was read."""

    path: Path
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """A tensor, or some leading-dimension rows of one, as a contiguous range of bytes in a file."""

    name: str
    file: WeightFile
    dtype: str  # safetensors code, e.g. "BF16"
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    nbytes: int

    def item(self, index: int) -> "Extent":
        """Element `index` of the leading dimension, which goes away."""
        step = self.nbytes // self.shape[0]
        return replace(
            self, name=f"{self.name}[{index}]", shape=self.shape[1:], begin=self.begin + index * step, nbytes=step
        )

    def rows(self, start: int, stop: int) -> "Extent":
        """Rows [start, stop) of the leading dimension, which stays."""
        step = self.nbytes // self.shape[0]
        return replace(
            self,
            name=f"{self.name}[{start}:{stop}]",
            shape=(stop - start, *self.shape[1:]),
            begin=self.begin + start * step,
            nbytes=(stop - start) * step,
        )


def read_extent(extent: Extent, into: Tensor | None = None) -> Tensor:
    """Read `extent` into a tensor that owns its memory; any number of threads may read at once.

    Args:
        extent: what to read.
        into: a contiguous tensor of the extent's dtype and number of elements to fill, instead of a new one.

    Raises:
        CorruptWeights: the file is gone, changed since its header was read, or holds NaN or infinity here.
        UnsupportedModel: the dtype is none that weights or quantised pieces come in.
    """
    file = extent.file
    dtype = DTYPES.get(extent.dtype) or PIECE_DTYPES.get(extent.dtype)
    if dtype is None:
        raise UnsupportedModel(
            f"{file.path}: tensor {extent.name} has dtype {extent.dtype} "
            f"(supported: {', '.join([*DTYPES, *PIECE_DTYPES])})"
        )
    raw = paged_tensors(((extent.nbytes,), torch.uint8))[0] if into is None else into.view(-1).view(torch.uint8)
    assert raw.numel() == extent.nbytes, "the caller offers memory of the right size"
    _fill(raw.numpy().data, extent)
    tensor = raw.view(dtype).view(extent.shape)
    # aminmax propagates NaN and is ten times cheaper than isfinite().all() on bf16
    finite = extent.dtype not in DTYPES or not tensor.numel()
    if not (finite or all(math.isfinite(bound.item()) for bound in torch.aminmax(tensor))):
        raise CorruptWeights(f"{file.path}: tensor {extent.name} holds NaN or infinity")
    return tensor


def _fill(view: memoryview, extent: Extent) -> None:
    file = extent.file
    try:
        with file.path.open("rb", buffering=0) as source:
            status = os.fstat(source.fileno())
            if (status.st_size, status.st_mtime_ns) != (file.size_bytes, file.mtime_ns):
                raise CorruptWeights(f"{file.path}: changed on disk since the model was opened; reopen the model")
            source.seek(extent.begin)
            filled = 0
            while filled < extent.nbytes:
                num_bytes = source.readinto(view[filled:])
                if not num_bytes:
                    raise CorruptWeights(
                        f"{file.path}: truncated: tensor {extent.name} has {filled} of {extent.nbytes} bytes"
                    )
                filled += num_bytes
    except OSError as err:
        raise CorruptWeights(f"{file.path}: cannot read tensor {extent.name}: {err.strerror or err}") from err


def index_directory(path: Path) -> dict[str, Extent]:
    """Every tensor of a Hugging Face model directory by name, from the index and the safetensors headers alone.

    Files: those `model.safetensors.index.json` names; else `model.safetensors`; else every `*.safetensors`.

    Raises:
        UnsupportedModel: no safetensors weights in the directory.
        CorruptWeights: a file or tensor that the index names is missing, or a header is bad.
    """
    index_path = path / INDEX_NAME
    if index_path.is_file():
        weight_map = _read_weight_map(index_path)
        files = {file_name: path / file_name for file_name in sorted(set(weight_map.values()))}
        extents = _merge(files.values())
        for name, file_name in weight_map.items():
            if name not in extents or extents[name].file.path is not files[file_name]:
                raise CorruptWeights(f"{path / file_name}: tensor {name} is missing ({INDEX_NAME} says it is here)")
        return extents
    single = path / SINGLE_NAME
    return _merge([single] if single.is_file() else _unindexed_shards(path))


def _read_weight_map(index_path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index_path.read_bytes())["weight_map"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as err:
        raise CorruptWeights(f"{index_path}: not a safetensors index ({type(err).__name__}: {err})") from err
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptWeights(f"{index_path}: weight_map is not a non-empty object")
    plain: set[str] = set()
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or file_name not in plain:
            if not _is_plain(file_name):
                raise CorruptWeights(
                    f"{index_path}: weight_map[{name!r}] is {file_name!r}, not the name of a .safetensors file here"
                )
            plain.add(file_name)
    return weight_map


def _is_plain(file_name: object) -> bool:
    return isinstance(file_name, str) and Path(file_name).name == file_name and file_name.endswith(".safetensors")


def _unindexed_shards(path: Path) -> list[Path]:
    shards = sorted(path.glob("*.safetensors"))
    if not shards:
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
        if pickles:
            raise UnsupportedModel(
                f"{path}: only pickled weights ({pickles[0]}), which are never read: convert them to .safetensors"
            )
        raise UnsupportedModel(f"{path}: no .safetensors file")
    present = {shard.name for shard in shards}
    for shard in shards:
        if numbered := _NUMBERED.fullmatch(shard.name):
            stem, number, total = numbered.groups()
            for other in range(1, int(total) + 1):
                sibling = f"{stem}-{other:0{len(number)}d}-of-{total}.safetensors"
                if sibling not in present:
                    raise CorruptWeights(f"{path / sibling}: missing (next to {shard.name})")
    return shards


def _merge(files: Iterable[Path]) -> dict[str, Extent]:
    extents: dict[str, Extent] = {}
    for file in files:
        for extent in _read_header(file):
            if extent.name in extents:
                raise CorruptWeights(f"{file}: tensor {extent.name} is also in {extents[extent.name].file.path.name}")
            extents[extent.name] = extent
    return extents


def _read_header(path: Path) -> list[Extent]:
    if not path.is_file():
        raise CorruptWeights(f"{path}: missing")
    try:
        with path.open("rb") as source:
            status = os.fstat(source.fileno())
            header_bytes = int.from_bytes(source.read(8), "little")
            if header_bytes > MAX_HEADER_BYTES:
                raise CorruptWeights(f"{path}: header of {header_bytes} bytes exceeds the limit of {MAX_HEADER_BYTES}")
            if status.st_size < 8 + header_bytes:
                raise CorruptWeights(
                    f"{path}: truncated: {status.st_size} bytes cannot hold a header of {header_bytes} bytes"
                )
            header = json.loads(source.read(header_bytes))
    except OSError as err:
        raise CorruptWeights(f"{path}: cannot be read: {err.strerror or err}") from err
    except (ValueError, RecursionError) as err:
        raise CorruptWeights(f"{path}: the header is not JSON ({err})") from err
    if not isinstance(header, dict):
        raise CorruptWeights(f"{path}: the header is not a JSON object")
    header.pop("__metadata__", None)
    file = WeightFile(path=path, size_bytes=status.st_size, mtime_ns=status.st_mtime_ns)
    extents = [_parse_entry(file, name, entry, 8 + header_bytes) for name, entry in header.items()]
    end = 8 + header_bytes  # the format allows neither holes nor overlaps
    for extent in sorted(extents, key=lambda extent: (extent.begin, extent.nbytes)):
        if extent.begin != end:
            raise CorruptWeights(f"{path}: bad header: tensor {extent.name} starts at byte {extent.begin}, not {end}")
        end += extent.nbytes
    if end != status.st_size:
        what = "truncated" if status.st_size < end else "bad header"
        raise CorruptWeights(f"{path}: {what}: {status.st_size} bytes, but the header describes {end}")
    return extents


def _parse_entry(file: WeightFile, name: str, entry: Any, data_begin: int) -> Extent:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        well_formed = (
            isinstance(dtype, str) and set(map(type, numbers := (*shape, begin, end))) == {int} and min(numbers) >= 0
        )
    except (KeyError, TypeError, ValueError):
        well_formed = False
    if not well_formed or end < begin:
        raise CorruptWeights(f"{file.path}: bad header: tensor {name} is described as {str(entry)[:200]}")
    item_bytes = _ITEM_BYTES.get(dtype)
    if item_bytes is not None and math.prod(shape) * item_bytes != end - begin:
        raise CorruptWeights(
            f"{file.path}: bad header: tensor {name} of shape {shape} and dtype {dtype} spans {end - begin} bytes, "
            f"expected {math.prod(shape) * item_bytes}"
        )
    return Extent(name=name, file=file, dtype=dtype, shape=shape, begin=data_begin + begin, nbytes=end - begin)
