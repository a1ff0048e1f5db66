"""The gRPC services as data: method names, kinds and how servers and clients attach to them.

The hot methods move raw `bytes` through gRPC; `protos.codec` encodes and decodes them, so that tensors are not copied
and a malformed message is answered with our own error instead of ending the stream. The other methods use protobuf's
serialisers. Every server also offers grpc.health.v1 and reflection.
"""

import socket
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeAlias

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from protos import expert_pb2, router_pb2
from protos.errors import ERROR_METADATA_KEY, ExpertmeshError, InternalError, InvalidRequest, to_proto

EXPERT_SERVICE: Final = "expertmesh.v1.ExpertService"
ROUTER_SERVICE: Final = "expertmesh.v1.RouterService"

# Row blocks are at most about 1 MiB, but a client may send a whole request in one message.
MAX_MESSAGE_BYTES: Final = 256 << 20
CHANNEL_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.use_local_subchannel_pool", 1),
)

Handler = Callable[..., Awaitable[Any]]
HealthServicer: TypeAlias = health.aio.HealthServicer


def expert_handlers(*, compute: Handler, status: Handler, fetch: Handler) -> grpc.GenericRpcHandler:
    """ExpertService: `compute(unused, context)` reads and writes raw bytes; `fetch(request, context)` writes raw bytes
    (ExpertChunk); `status(request, context)`."""
    return grpc.method_handlers_generic_handler(
        EXPERT_SERVICE,
        {
            "Compute": grpc.stream_stream_rpc_method_handler(compute),
            "Status": grpc.unary_unary_rpc_method_handler(
                status,
                request_deserializer=expert_pb2.StatusRequest.FromString,
                response_serializer=expert_pb2.StatusResponse.SerializeToString,
            ),
            "FetchExperts": grpc.unary_stream_rpc_method_handler(
                fetch, request_deserializer=expert_pb2.FetchExpertsRequest.FromString
            ),
        },
    )


def router_handlers(*, stream: Handler, forward: Handler, describe: Handler) -> grpc.GenericRpcHandler:
    """RouterService: `stream` and `forward` move raw bytes (ForwardRequest, ForwardResponse)."""
    return grpc.method_handlers_generic_handler(
        ROUTER_SERVICE,
        {
            "Stream": grpc.stream_stream_rpc_method_handler(stream),
            "Forward": grpc.unary_unary_rpc_method_handler(forward),
            "Describe": grpc.unary_unary_rpc_method_handler(
                describe,
                request_deserializer=router_pb2.DescribeRequest.FromString,
                response_serializer=router_pb2.DescribeResponse.SerializeToString,
            ),
        },
    )


def compute_stream(channel: grpc.aio.Channel) -> grpc.aio.StreamStreamCall:
    """Open ExpertService.Compute; messages are raw bytes."""
    return channel.stream_stream(f"/{EXPERT_SERVICE}/Compute")()


def status_method(channel: grpc.aio.Channel) -> Callable[..., Awaitable[expert_pb2.StatusResponse]]:
    """ExpertService.Status as a callable taking a StatusRequest."""
    method: Callable[..., Awaitable[expert_pb2.StatusResponse]] = channel.unary_unary(
        f"/{EXPERT_SERVICE}/Status",
        request_serializer=expert_pb2.StatusRequest.SerializeToString,
        response_deserializer=expert_pb2.StatusResponse.FromString,
    )
    return method


def fetch_stream(
    channel: grpc.aio.Channel, request: expert_pb2.FetchExpertsRequest, *, timeout_s: float
) -> grpc.aio.UnaryStreamCall:
    """Open ExpertService.FetchExperts; what comes are raw bytes (ExpertChunk), for at most `timeout_s` seconds."""
    method = channel.unary_stream(
        f"/{EXPERT_SERVICE}/FetchExperts", request_serializer=expert_pb2.FetchExpertsRequest.SerializeToString
    )
    return method(request, timeout=timeout_s)


def router_stream(channel: grpc.aio.Channel) -> grpc.aio.StreamStreamCall:
    """Open RouterService.Stream; messages are raw bytes."""
    return channel.stream_stream(f"/{ROUTER_SERVICE}/Stream")()


def forward_method(channel: grpc.aio.Channel) -> Callable[..., Awaitable[bytes]]:
    """RouterService.Forward as a callable on raw bytes."""
    method: Callable[..., Awaitable[bytes]] = channel.unary_unary(f"/{ROUTER_SERVICE}/Forward")
    return method


def describe_method(channel: grpc.aio.Channel) -> Callable[..., Awaitable[router_pb2.DescribeResponse]]:
    """RouterService.Describe as a callable taking a DescribeRequest."""
    method: Callable[..., Awaitable[router_pb2.DescribeResponse]] = channel.unary_unary(
        f"/{ROUTER_SERVICE}/Describe",
        request_serializer=router_pb2.DescribeRequest.SerializeToString,
        response_deserializer=router_pb2.DescribeResponse.FromString,
    )
    return method


async def start_server(
    service: str, handlers: grpc.GenericRpcHandler, *, host: str, port: int
) -> tuple[grpc.aio.Server, str, HealthServicer]:
    """Start a gRPC server with health and reflection; returns it, its "host:port" and the health servicer.

    Args:
        service: full name, reported SERVING.
        port: 0 picks a free one. A fixed port is opened with SO_REUSEPORT, so that routers can share a node; a port
            that anything else holds is refused.

    Raises:
        InvalidRequest: the port cannot be bound.
    """
    server = grpc.aio.server(options=(*CHANNEL_OPTIONS, ("grpc.so_reuseport", 1 if port else 0)))
    server.add_generic_rpc_handlers((handlers,))
    checks = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection((service, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    address = f"[{host}]" if ":" in host else host
    try:
        bound = server.add_insecure_port(f"{address}:{port}")
    except RuntimeError as err:
        raise InvalidRequest(f"port {port} on {host} cannot be bound: it is in use or not permitted") from err
    if bound == 0:
        raise InvalidRequest(f"port {port} on {host} cannot be bound: it is in use or not permitted")
    await server.start()
    await set_serving(checks, service, serving=True)
    return server, f"{address}:{bound}", checks


async def set_serving(checks: HealthServicer, service: str, *, serving: bool) -> None:
    """What grpc.health.v1 answers for the service and for the server as a whole."""
    states = health_pb2.HealthCheckResponse
    for name in ("", service):
        await checks.set(name, states.SERVING if serving else states.NOT_SERVING)


async def abort(context: grpc.aio.ServicerContext, error: BaseException) -> None:
    """End a unary call with `error`: its gRPC status, its message, and our Error in the trailing metadata."""
    proto = to_proto(error)
    status = error.status if isinstance(error, ExpertmeshError) else InternalError.status
    await context.abort(status, proto.message, ((ERROR_METADATA_KEY, proto.SerializeToString()),))


def require_free_port(host: str, port: int) -> None:
    """Raise InvalidRequest if something listens on host:port without SO_REUSEPORT (a clear error before gRPC's own)."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            probe.bind((host, port))
        except OSError as err:
            raise InvalidRequest(f"port {port} on {host} cannot be bound: {err.strerror}") from err
