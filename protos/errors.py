"""The error contract: every failure a caller can see, its gRPC status and the caller's next move.

    ExpertmeshError
    ├── InvalidRequest      INVALID_ARGUMENT     shape, dtype, layer, expert id, non-finite input: fix the call
    │   └── UnsupportedModel INVALID_ARGUMENT    a config or checkpoint layout we do not understand: fix the model
    ├── StalePlacement      FAILED_PRECONDITION  the server no longer holds the expert: refresh the table, replan once
    ├── Overloaded          RESOURCE_EXHAUSTED   a queue or capacity is full: another copy, or the overflow policy
    ├── Unavailable         UNAVAILABLE
    │   ├── Draining        UNAVAILABLE          the server is leaving: another copy
    │   ├── NoCopy          UNAVAILABLE          no live copy of an expert: wait for a new epoch, or the overflow policy
    │   └── ServerLost      UNAVAILABLE          the stream to a server broke or missed its hop deadline: another copy
    ├── DeadlineExceeded    DEADLINE_EXCEEDED    surface it; work is cancelled downstream
    ├── Unauthenticated     UNAUTHENTICATED      fix the credentials
    ├── CorruptWeights      DATA_LOSS            checksum, shape or non-finite weights: the server refuses to load
    └── InternalError       INTERNAL             our bug: traceback in the server's log, the server lives

The same class is raised on both ends: `to_proto` on the side that failed, `from_proto` on the side that asked.
Messages name the field, the value and the limit.
"""

import grpc

from protos import common_pb2


class ExpertmeshError(Exception):
    """Base of every error of the contract.

    Args:
        message: one sentence with the field, the value and the limit.
        retry_after_s: seconds until a retry may succeed; 0 for no hint.
    """

    status: grpc.StatusCode = grpc.StatusCode.INTERNAL

    def __init__(self, message: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.retry_after_s))


class InvalidRequest(ExpertmeshError):
    """The request breaks the contract: shape, dtype, layer, expert id, token count or a non-finite value."""

    status = grpc.StatusCode.INVALID_ARGUMENT


class UnsupportedModel(InvalidRequest):
    """The model directory is unreadable, or its config or tensor layout is not one we understand."""


class StalePlacement(ExpertmeshError):
    """The server does not hold the expert (any more)."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class Overloaded(ExpertmeshError):
    """A bounded queue or an expert's capacity is full; `retry_after_s` estimates when it has room."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class Unavailable(ExpertmeshError):
    """Nobody can serve this now."""

    status = grpc.StatusCode.UNAVAILABLE


class Draining(Unavailable):
    """The server is leaving and takes no new work."""


class NoCopy(Unavailable):
    """An expert has no live copy."""


class ServerLost(Unavailable):
    """The stream to an expert server broke, or the server missed its hop deadline."""


class DeadlineExceeded(ExpertmeshError):
    """The answer did not come within the request's time limit."""

    status = grpc.StatusCode.DEADLINE_EXCEEDED


class Unauthenticated(ExpertmeshError):
    """Credentials are missing or wrong."""

    status = grpc.StatusCode.UNAUTHENTICATED


class CorruptWeights(ExpertmeshError):
    """A checkpoint file is truncated, or a tensor is missing, of the wrong shape or not finite."""

    status = grpc.StatusCode.DATA_LOSS


class InternalError(ExpertmeshError):
    """A bug of ours; the server's log has the traceback."""


_KINDS: dict[str, type[ExpertmeshError]] = {
    cls.__name__: cls
    for cls in (
        InvalidRequest,
        UnsupportedModel,
        StalePlacement,
        Overloaded,
        Unavailable,
        Draining,
        NoCopy,
        ServerLost,
        DeadlineExceeded,
        Unauthenticated,
        CorruptWeights,
        InternalError,
    )
}

# gRPC answers some failures itself, without our Error: the most general class of that status.
_BY_STATUS: dict[grpc.StatusCode, type[ExpertmeshError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.FAILED_PRECONDITION: StalePlacement,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.DATA_LOSS: CorruptWeights,
}

ERROR_METADATA_KEY = "expertmesh-error-bin"


def to_proto(error: BaseException) -> common_pb2.Error:
    """The wire form of `error`; anything outside the tree becomes InternalError without its details."""
    if not isinstance(error, ExpertmeshError):
        return common_pb2.Error(kind="InternalError", message=f"internal error ({type(error).__name__})")
    return common_pb2.Error(kind=type(error).__name__, message=error.message, retry_after_s=error.retry_after_s)


def from_proto(proto: common_pb2.Error) -> ExpertmeshError:
    """The error the other end raised; a kind that this version does not know becomes InternalError."""
    kind = _KINDS.get(proto.kind)
    if kind is None:
        return InternalError(f"{proto.kind}: {proto.message}")
    return kind(proto.message, retry_after_s=proto.retry_after_s)


def from_rpc(error: grpc.RpcError) -> ExpertmeshError:
    """The error behind a failed RPC: ours from the trailing metadata, else by status code."""
    for key, value in error.trailing_metadata() or ():
        if key == ERROR_METADATA_KEY:
            return from_proto(common_pb2.Error.FromString(value))
    kind = _BY_STATUS.get(error.code(), InternalError)
    return kind(error.details() or str(error.code()))


def _rebuild(kind: type[ExpertmeshError], message: str, retry_after_s: float) -> ExpertmeshError:
    return kind(message, retry_after_s=retry_after_s)
