"""Tensors on the wire: dtype names, zero-copy reads, and messages whose payload is copied once.

A protobuf `bytes` field costs a copy into the message, one out of it at serialisation, and one more on the other
side at each access. The hot messages therefore keep their one large array in field 15, the last of the message:
`encode` joins the serialised head and the raw array (one copy), and `decode` parses the head alone and returns a
view of the array inside the received buffer (no copy). The bytes on the wire are ordinary protobuf either way.
"""

import warnings
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from google.protobuf.message import DecodeError, Message
from torch import Tensor

from protos import common_pb2
from protos.errors import InvalidRequest

M = TypeVar("M", bound=Message)
Buffer = bytes | memoryview

PAYLOAD_FIELD = 15
_PAYLOAD_TAG = PAYLOAD_FIELD << 3 | 2  # wire type 2: length-delimited

TORCH_DTYPES: dict[common_pb2.DType, torch.dtype] = {
    common_pb2.DTYPE_FLOAT32: torch.float32,
    common_pb2.DTYPE_BFLOAT16: torch.bfloat16,
    common_pb2.DTYPE_FLOAT16: torch.float16,
}
WIRE_DTYPES: dict[torch.dtype, common_pb2.DType] = {dtype: wire for wire, dtype in TORCH_DTYPES.items()}

with warnings.catch_warnings():
    # torch warns once per process that a tensor over `bytes` is not writable. We never write to received tensors.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


def tensor_bytes(x: Tensor) -> memoryview:
    """The raw little-endian bytes of a tensor: a view when it is contiguous and on the CPU, else of a copy.

    Raises:
        InvalidRequest: the dtype does not travel (only float32, bfloat16 and float16 do).
    """
    if x.dtype not in WIRE_DTYPES:
        raise InvalidRequest(f"dtype {x.dtype} does not travel (supported: float32, bfloat16, float16)")
    words: Any = words_of(x.detach().cpu())
    return memoryview(words).cast("B") if x.numel() else memoryview(b"")


def matrix_bytes(y_RD: npt.NDArray[np.float32], dtype: torch.dtype) -> memoryview:
    """The bytes of a contiguous fp32 matrix, rounded to `dtype`.

    Small messages stay in numpy: with caches cold, as they are after every wait, a torch operation costs about 0.07 ms
    and a numpy one 0.02 ms.
    """
    if dtype is not torch.float32:
        return tensor_bytes(torch.from_numpy(y_RD).to(dtype))
    buffer: Any = y_RD
    return memoryview(buffer).cast("B") if y_RD.size else memoryview(b"")


def read_matrix(data: Buffer, dtype: common_pb2.DType, shape: tuple[int, int], *, name: str) -> npt.NDArray[np.float32]:
    """An fp32 matrix from `data`: a read-only view where it travelled as fp32, else converted.

    Raises:
        InvalidRequest: as `read_tensor`.
    """
    if dtype == common_pb2.DTYPE_FLOAT32 and len(data) == 4 * shape[0] * shape[1]:
        return np.frombuffer(data, dtype=np.float32).reshape(shape)
    matrix: npt.NDArray[np.float32] = read_tensor(data, dtype, shape, name=name).float().numpy()
    return matrix


def read_tensor(data: Buffer, dtype: common_pb2.DType, shape: tuple[int, ...], *, name: str) -> Tensor:
    """A tensor over `data`, without a copy. Treat it as read-only: it shares the received message's memory.

    Raises:
        InvalidRequest: unknown dtype, or the byte count does not match the shape; `name` is the field it names.
    """
    torch_dtype = TORCH_DTYPES.get(dtype)
    if torch_dtype is None:
        raise InvalidRequest(f"{name}.dtype is {dtype} (supported: 1 float32, 2 bfloat16, 3 float16)")
    count = 1
    for size in shape:
        count *= size
    expected = count * torch_dtype.itemsize
    if len(data) != expected:
        raise InvalidRequest(f"{name} has {len(data)} bytes, shape {list(shape)} of {torch_dtype} needs {expected}")
    if count == 0:
        return torch.empty(shape, dtype=torch_dtype)
    return torch.frombuffer(data, dtype=torch_dtype).view(shape)


def read_ints(data: Buffer, *, name: str, count: int | None = None) -> npt.NDArray[np.int32]:
    """A read-only view of an int32 array field.

    Raises:
        InvalidRequest: not a multiple of 4 bytes, or not `count` elements where given.
    """
    _check_words(data, name, count)
    return np.frombuffer(data, dtype=np.int32)


def read_longs(data: Buffer, *, name: str, count: int) -> npt.NDArray[np.int64]:
    """A read-only view of an int64 array field of `count` elements; raises as `read_ints`."""
    if memoryview(data).nbytes != 8 * count:
        raise InvalidRequest(f"{name} has {memoryview(data).nbytes} bytes, expected {count} elements of 8")
    return np.frombuffer(data, dtype=np.int64)


def read_floats(data: Buffer, *, name: str, count: int | None = None) -> npt.NDArray[np.float32]:
    """A read-only view of a float32 array field; raises as `read_ints`."""
    _check_words(data, name, count)
    return np.frombuffer(data, dtype=np.float32)


def _check_words(data: Buffer, name: str, count: int | None) -> None:
    if len(data) % 4 or (count is not None and len(data) != 4 * count):
        wanted = "a multiple of 4" if count is None else str(4 * count)
        raise InvalidRequest(f"{name} has {len(data)} bytes, expected {wanted}")


def encode(head: Message, payload: Buffer) -> bytes:
    """The message `head` with `payload` as its field 15. `head` must not have that field set."""
    size = len(payload)
    prefix = bytearray((_PAYLOAD_TAG,))
    while size > 0x7F:
        prefix.append(size & 0x7F | 0x80)
        size >>= 7
    prefix.append(size)
    return b"".join((head.SerializeToString(), prefix, payload))


def decode(kind: type[M], buffer: bytes) -> tuple[M, memoryview]:
    """Parse a message, returning it without field 15, and a view of field 15 (empty if absent).

    Raises:
        InvalidRequest: the bytes are not a message of this kind.
    """
    start, begin = _find_payload(buffer)
    try:
        if start >= 0:
            return kind.FromString(buffer[:start]), memoryview(buffer)[begin:]
        message = kind.FromString(buffer)
    except DecodeError as err:
        raise InvalidRequest(f"malformed {kind.DESCRIPTOR.name} ({len(buffer)} bytes)") from err
    field = message.DESCRIPTOR.fields_by_number[PAYLOAD_FIELD].name
    payload = memoryview(getattr(message, field))
    message.ClearField(field)
    return message, payload


def _find_payload(buffer: bytes) -> tuple[int, int]:
    """(start of the payload field, start of its bytes) if the payload is the last field of the message, else (-1, -1).

    Walks the top-level fields. Anything unusual (fields after the payload, numbers above 15, truncation) is left to
    the full parser.
    """
    pos, end = 0, len(buffer)
    try:
        while pos < end:
            start = pos
            tag = buffer[pos]
            pos += 1
            wire_type = tag & 7
            if tag > 0x7F:
                return -1, -1
            if wire_type == 2 or wire_type == 0:
                value = shift = 0
                while True:
                    byte = buffer[pos]
                    pos += 1
                    value |= (byte & 0x7F) << shift
                    if byte < 0x80:
                        break
                    shift += 7
                if wire_type == 2:
                    if tag == _PAYLOAD_TAG:
                        return (start, pos) if pos + value == end else (-1, -1)
                    pos += value
            elif wire_type == 5:
                pos += 4
            elif wire_type == 1:
                pos += 8
            else:
                return -1, -1
    except IndexError:
        pass
    return -1, -1


def words_of(x: Tensor) -> npt.NDArray[np.generic]:
    """A numpy view of a tensor's elements (16-bit floats as int16), for what only moves or sums them."""
    flat = x if x.is_contiguous() else x.contiguous()
    words: npt.NDArray[np.generic] = (flat if flat.dtype is torch.float32 else flat.view(torch.int16)).numpy()
    return words
