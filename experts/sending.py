"""The sending side of FetchExperts: copies to another server, without disturbing the requests of this one.

A stream holds one chunk at a time, gRPC's flow control decides when the next is due, and while routed pairs wait here
each chunk waits too, for a moment.
"""

import asyncio
from collections.abc import Callable
from typing import TypeVar

import grpc.aio

from experts.copyform import checksum, form_of, pieces
from experts.weights import CopyKey, ExpertCopy, ExpertShard
from protos import expert_pb2
from protos.codec import encode
from protos.errors import ExpertmeshError, InvalidRequest, Overloaded
from protos.loops import background_executor, give_way
from protos.services import abort

T = TypeVar("T")

CHUNK_BYTES = 1 << 18  # 1 MiB is no faster, and holds up the loop for four times as long
MAX_FETCHES = 4  # at once; what is more is better served by storage, or another peer
GIVE_WAY_S = 0.0025  # longest wait of a chunk for requests: 100 MB/s are left to a fetch


class CopySender:
    """Answers FetchExperts on the server's data loop.

    Args:
        shard: what this server holds.
        is_busy: whether routed pairs wait or run here.
    """

    def __init__(self, shard: ExpertShard, is_busy: Callable[[], bool]) -> None:
        self._shard = shard
        self._is_busy = is_busy
        self._open = 0
        self._thread = background_executor("expertmesh-checksum")

    def start(self) -> None:
        """Find out which weights these are while storage is there: copies can then be given when it is not."""
        self._thread.submit(getattr, self._shard.checkpoint, "fingerprint")

    async def fetch(self, request: expert_pb2.FetchExpertsRequest, context: grpc.aio.ServicerContext) -> None:
        """The gRPC method."""
        self._open += 1
        try:
            copies = await self._find(request)
            for key, copy in copies.items():
                await self._send(key, copy, context)
        except ExpertmeshError as err:
            await abort(context, err)
        finally:
            self._open -= 1

    def stop(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _find(self, request: expert_pb2.FetchExpertsRequest) -> dict[CopyKey, ExpertCopy]:
        """The copies asked for: they stay in memory until they are sent, also if they are unloaded meanwhile."""
        shard = self._shard
        if self._open > MAX_FETCHES:
            raise Overloaded(f"{self._open} fetches at once exceed the limit of {MAX_FETCHES}", retry_after_s=1.0)
        if not request.copies:
            raise InvalidRequest("copies is empty, at least 1 is needed")
        asked = (request.compute_dtype, request.weight_dtype)
        if asked != shard.form:
            raise InvalidRequest(f"copies are asked for in {asked}, this server holds them in {shard.form}")
        copies = {(key.layer, key.expert): shard.find(key.layer, [key.expert])[key.expert] for key in request.copies}
        fingerprint = await self._run(lambda: shard.checkpoint.fingerprint)
        if request.fingerprint != fingerprint:
            raise InvalidRequest(
                f"copies are asked for of checkpoint {request.fingerprint}, this server's is {fingerprint}"
            )
        return copies

    async def _send(self, key: CopyKey, copy: ExpertCopy, context: grpc.aio.ServicerContext) -> None:
        head = expert_pb2.CopyHead(
            layer=key[0],
            expert=key[1],
            tensors=[
                expert_pb2.TensorHead(name=name, dtype=dtype, shape=shape) for name, dtype, shape in form_of(copy)
            ],
            crc32=await self._run(lambda: checksum(copy)),
        )
        first: expert_pb2.CopyHead | None = head
        for piece in pieces(copy, CHUNK_BYTES):
            await give_way(self._is_busy, GIVE_WAY_S)
            await context.write(encode(expert_pb2.ExpertChunk(head=first), piece))
            first = None

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
