from protos import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ForwardRequest(_message.Message):
    __slots__ = ("request_id", "layer", "num_tokens", "dtype", "timeout_s", "routing", "overflow", "return_routing", "token_ids", "x")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    ROUTING_FIELD_NUMBER: _ClassVar[int]
    OVERFLOW_FIELD_NUMBER: _ClassVar[int]
    RETURN_ROUTING_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    X_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    layer: str
    num_tokens: int
    dtype: _common_pb2.DType
    timeout_s: float
    routing: Routing
    overflow: OverflowPolicy
    return_routing: bool
    token_ids: bytes
    x: bytes
    def __init__(self, request_id: _Optional[int] = ..., layer: _Optional[str] = ..., num_tokens: _Optional[int] = ..., dtype: _Optional[_Union[_common_pb2.DType, str]] = ..., timeout_s: _Optional[float] = ..., routing: _Optional[_Union[Routing, _Mapping]] = ..., overflow: _Optional[_Union[OverflowPolicy, _Mapping]] = ..., return_routing: _Optional[bool] = ..., token_ids: _Optional[bytes] = ..., x: _Optional[bytes] = ...) -> None: ...

class Routing(_message.Message):
    __slots__ = ("top_k", "expert_ids", "gate_weights")
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    EXPERT_IDS_FIELD_NUMBER: _ClassVar[int]
    GATE_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    top_k: int
    expert_ids: bytes
    gate_weights: bytes
    def __init__(self, top_k: _Optional[int] = ..., expert_ids: _Optional[bytes] = ..., gate_weights: _Optional[bytes] = ...) -> None: ...

class OverflowPolicy(_message.Message):
    __slots__ = ("chain", "capacity_factor", "max_score_gap", "renormalize", "keep")
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FACTOR_FIELD_NUMBER: _ClassVar[int]
    MAX_SCORE_GAP_FIELD_NUMBER: _ClassVar[int]
    RENORMALIZE_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    chain: _containers.RepeatedScalarFieldContainer[str]
    capacity_factor: float
    max_score_gap: float
    renormalize: bool
    keep: str
    def __init__(self, chain: _Optional[_Iterable[str]] = ..., capacity_factor: _Optional[float] = ..., max_score_gap: _Optional[float] = ..., renormalize: _Optional[bool] = ..., keep: _Optional[str] = ...) -> None: ...

class Ledger(_message.Message):
    __slots__ = ("pairs", "computed", "copied", "waited", "rerouted", "dropped", "retried", "dropped_gate_mass", "epoch", "batch_tokens", "num_servers", "queue_s", "gate_s", "experts_s", "total_s")
    PAIRS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_FIELD_NUMBER: _ClassVar[int]
    COPIED_FIELD_NUMBER: _ClassVar[int]
    WAITED_FIELD_NUMBER: _ClassVar[int]
    REROUTED_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    RETRIED_FIELD_NUMBER: _ClassVar[int]
    DROPPED_GATE_MASS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_SERVERS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    GATE_S_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_S_FIELD_NUMBER: _ClassVar[int]
    TOTAL_S_FIELD_NUMBER: _ClassVar[int]
    pairs: int
    computed: int
    copied: int
    waited: int
    rerouted: int
    dropped: int
    retried: int
    dropped_gate_mass: float
    epoch: int
    batch_tokens: int
    num_servers: int
    queue_s: float
    gate_s: float
    experts_s: float
    total_s: float
    def __init__(self, pairs: _Optional[int] = ..., computed: _Optional[int] = ..., copied: _Optional[int] = ..., waited: _Optional[int] = ..., rerouted: _Optional[int] = ..., dropped: _Optional[int] = ..., retried: _Optional[int] = ..., dropped_gate_mass: _Optional[float] = ..., epoch: _Optional[int] = ..., batch_tokens: _Optional[int] = ..., num_servers: _Optional[int] = ..., queue_s: _Optional[float] = ..., gate_s: _Optional[float] = ..., experts_s: _Optional[float] = ..., total_s: _Optional[float] = ...) -> None: ...

class ForwardResponse(_message.Message):
    __slots__ = ("request_id", "error", "num_tokens", "dtype", "ledger", "routing", "y")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    ROUTING_FIELD_NUMBER: _ClassVar[int]
    Y_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    error: _common_pb2.Error
    num_tokens: int
    dtype: _common_pb2.DType
    ledger: Ledger
    routing: Routing
    y: bytes
    def __init__(self, request_id: _Optional[int] = ..., error: _Optional[_Union[_common_pb2.Error, _Mapping]] = ..., num_tokens: _Optional[int] = ..., dtype: _Optional[_Union[_common_pb2.DType, str]] = ..., ledger: _Optional[_Union[Ledger, _Mapping]] = ..., routing: _Optional[_Union[Routing, _Mapping]] = ..., y: _Optional[bytes] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("model", "family", "dtype", "dim", "num_experts", "top_k", "layers", "max_request_tokens", "epoch", "overflow", "weight_dtype", "token_id_layers")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    OVERFLOW_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DTYPE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_LAYERS_FIELD_NUMBER: _ClassVar[int]
    model: str
    family: str
    dtype: _common_pb2.DType
    dim: int
    num_experts: int
    top_k: int
    layers: _containers.RepeatedScalarFieldContainer[str]
    max_request_tokens: int
    epoch: int
    overflow: OverflowPolicy
    weight_dtype: str
    token_id_layers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, model: _Optional[str] = ..., family: _Optional[str] = ..., dtype: _Optional[_Union[_common_pb2.DType, str]] = ..., dim: _Optional[int] = ..., num_experts: _Optional[int] = ..., top_k: _Optional[int] = ..., layers: _Optional[_Iterable[str]] = ..., max_request_tokens: _Optional[int] = ..., epoch: _Optional[int] = ..., overflow: _Optional[_Union[OverflowPolicy, _Mapping]] = ..., weight_dtype: _Optional[str] = ..., token_id_layers: _Optional[_Iterable[str]] = ...) -> None: ...
