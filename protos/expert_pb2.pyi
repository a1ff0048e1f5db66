from protos import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ServerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SERVER_STATE_UNSPECIFIED: _ClassVar[ServerState]
    SERVER_STATE_SERVING: _ClassVar[ServerState]
    SERVER_STATE_DRAINING: _ClassVar[ServerState]
SERVER_STATE_UNSPECIFIED: ServerState
SERVER_STATE_SERVING: ServerState
SERVER_STATE_DRAINING: ServerState

class ComputeRequest(_message.Message):
    __slots__ = ("call_id", "layer", "epoch", "num_rows", "dtype", "partial_dtype", "timeout_s", "pair_row", "pair_expert", "pair_weight", "cancel", "x")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_DTYPE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    PAIR_ROW_FIELD_NUMBER: _ClassVar[int]
    PAIR_EXPERT_FIELD_NUMBER: _ClassVar[int]
    PAIR_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    X_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    layer: str
    epoch: int
    num_rows: int
    dtype: _common_pb2.DType
    partial_dtype: _common_pb2.DType
    timeout_s: float
    pair_row: bytes
    pair_expert: bytes
    pair_weight: bytes
    cancel: _containers.RepeatedScalarFieldContainer[int]
    x: bytes
    def __init__(self, call_id: _Optional[int] = ..., layer: _Optional[str] = ..., epoch: _Optional[int] = ..., num_rows: _Optional[int] = ..., dtype: _Optional[_Union[_common_pb2.DType, str]] = ..., partial_dtype: _Optional[_Union[_common_pb2.DType, str]] = ..., timeout_s: _Optional[float] = ..., pair_row: _Optional[bytes] = ..., pair_expert: _Optional[bytes] = ..., pair_weight: _Optional[bytes] = ..., cancel: _Optional[_Iterable[int]] = ..., x: _Optional[bytes] = ...) -> None: ...

class ComputeResponse(_message.Message):
    __slots__ = ("call_id", "error", "dtype", "queue_s", "compute_s", "launch_rows", "queue_tokens", "emulated", "partial")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    LAUNCH_ROWS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EMULATED_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    error: _common_pb2.Error
    dtype: _common_pb2.DType
    queue_s: float
    compute_s: float
    launch_rows: int
    queue_tokens: int
    emulated: bool
    partial: bytes
    def __init__(self, call_id: _Optional[int] = ..., error: _Optional[_Union[_common_pb2.Error, _Mapping]] = ..., dtype: _Optional[_Union[_common_pb2.DType, str]] = ..., queue_s: _Optional[float] = ..., compute_s: _Optional[float] = ..., launch_rows: _Optional[int] = ..., queue_tokens: _Optional[int] = ..., emulated: _Optional[bool] = ..., partial: _Optional[bytes] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ExpertCopy(_message.Message):
    __slots__ = ("layer", "expert", "tokens")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    layer: str
    expert: int
    tokens: int
    def __init__(self, layer: _Optional[str] = ..., expert: _Optional[int] = ..., tokens: _Optional[int] = ...) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("server_id", "state", "copies", "bytes", "budget_bytes", "queue_tokens", "busy_share", "compute_dtype", "emulated_tokens_per_s", "pid")
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    QUEUE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BUSY_SHARE_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    EMULATED_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    server_id: str
    state: ServerState
    copies: _containers.RepeatedCompositeFieldContainer[ExpertCopy]
    bytes: int
    budget_bytes: int
    queue_tokens: int
    busy_share: float
    compute_dtype: str
    emulated_tokens_per_s: float
    pid: int
    def __init__(self, server_id: _Optional[str] = ..., state: _Optional[_Union[ServerState, str]] = ..., copies: _Optional[_Iterable[_Union[ExpertCopy, _Mapping]]] = ..., bytes: _Optional[int] = ..., budget_bytes: _Optional[int] = ..., queue_tokens: _Optional[int] = ..., busy_share: _Optional[float] = ..., compute_dtype: _Optional[str] = ..., emulated_tokens_per_s: _Optional[float] = ..., pid: _Optional[int] = ...) -> None: ...

class ExpertKey(_message.Message):
    __slots__ = ("layer", "expert")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    layer: str
    expert: int
    def __init__(self, layer: _Optional[str] = ..., expert: _Optional[int] = ...) -> None: ...

class FetchExpertsRequest(_message.Message):
    __slots__ = ("copies", "compute_dtype", "weight_dtype", "fingerprint")
    COPIES_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DTYPE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    copies: _containers.RepeatedCompositeFieldContainer[ExpertKey]
    compute_dtype: str
    weight_dtype: str
    fingerprint: str
    def __init__(self, copies: _Optional[_Iterable[_Union[ExpertKey, _Mapping]]] = ..., compute_dtype: _Optional[str] = ..., weight_dtype: _Optional[str] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class ExpertChunk(_message.Message):
    __slots__ = ("head", "data")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    head: CopyHead
    data: bytes
    def __init__(self, head: _Optional[_Union[CopyHead, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class CopyHead(_message.Message):
    __slots__ = ("layer", "expert", "tensors", "crc32")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    layer: str
    expert: int
    tensors: _containers.RepeatedCompositeFieldContainer[TensorHead]
    crc32: int
    def __init__(self, layer: _Optional[str] = ..., expert: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[TensorHead, _Mapping]]] = ..., crc32: _Optional[int] = ...) -> None: ...

class TensorHead(_message.Message):
    __slots__ = ("name", "dtype", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...
