"""The receiving side of FetchExperts: a peer's copy, checked against what it must be.

Whatever a peer does wrong is an error within seconds, and the caller takes its next source.
"""

import asyncio
import zlib
from collections import OrderedDict
from collections.abc import Callable

import grpc.aio

from experts.copyform import empty_copy, form_of, moved, named_tensors, raw
from experts.weights import CopyKey, ExpertCopy, ExpertShard
from protos import expert_pb2
from protos.codec import decode
from protos.errors import CorruptWeights, DeadlineExceeded, InvalidRequest, from_rpc
from protos.loops import give_way
from protos.services import CHANNEL_OPTIONS, fetch_stream

CHUNK_TIMEOUT_S = 2.0  # until the first chunk, connecting included, and from each to the next
MIN_BYTES_PER_S = 16 << 20  # of a whole copy: a peer that is slower is given up
GIVE_WAY_S = 0.0025  # longest wait of a chunk for requests
MAX_CHANNELS = 8  # kept open to peers


class PeerClient:
    """Fetches copies of the form that `shard` holds. Lives on one event loop.

    Args:
        is_busy: whether requests wait or run here: chunks then wait too, for a moment, and the peer with them.
    """

    def __init__(self, shard: ExpertShard, is_busy: Callable[[], bool]) -> None:
        self._shard = shard
        self._is_busy = is_busy
        self._channels: OrderedDict[str, grpc.aio.Channel] = OrderedDict()  # by address, least recently used first

    async def fetch(self, address: str, key: CopyKey) -> ExpertCopy:
        """A peer's copy, the same bytes as the peer's.

        Raises:
            StalePlacement: the peer does not hold it.
            InvalidRequest: the peer holds it in another form, or of other weights.
            Overloaded: enough others fetch from the peer.
            CorruptWeights: what came is not such a copy.
            DeadlineExceeded: too slow.
            Unavailable: the peer is gone.
        """
        shard = self._shard
        compute_dtype, weight_dtype = shard.form
        request = expert_pb2.FetchExpertsRequest(
            copies=[expert_pb2.ExpertKey(layer=key[0], expert=key[1])],
            compute_dtype=compute_dtype,
            weight_dtype=weight_dtype,
            fingerprint=shard.checkpoint.fingerprint,
        )
        copy = empty_copy(shard.spec, key[0], shard.dtype, shard.weight_dtype)
        timeout_s = 2 * CHUNK_TIMEOUT_S + shard.copy_bytes / MIN_BYTES_PER_S
        call = fetch_stream(await self._channel(address), request, timeout_s=timeout_s)
        try:
            await self._receive(call, key, copy)
        except grpc.aio.AioRpcError as err:
            raise from_rpc(err) from err
        finally:
            call.cancel()
        return moved(copy, shard.device)

    async def forget(self, address: str) -> None:
        """Close the connection to a peer."""
        channel = self._channels.pop(address, None)
        if channel is not None:
            await channel.close()

    async def close(self) -> None:
        for address in list(self._channels):
            await self.forget(address)

    async def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            if len(self._channels) == MAX_CHANNELS:
                await self.forget(next(iter(self._channels)))
            self._channels[address] = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._channels.move_to_end(address)
        return self._channels[address]

    async def _receive(self, call: grpc.aio.UnaryStreamCall, key: CopyKey, copy: ExpertCopy) -> None:
        """Fill the copy's memory with what comes."""
        num_chunks, crc, wanted_crc = 0, 0, 0
        for name, tensor in named_tensors(copy).items():
            bytes_B = raw(tensor).numpy()
            filled = 0
            while filled < len(bytes_B):
                await give_way(self._is_busy, GIVE_WAY_S)
                chunk, data = await _next(call, key)
                if chunk.HasField("head") != (num_chunks == 0):
                    raise CorruptWeights(f"copy {key}: chunk {num_chunks} has {'a' if num_chunks else 'no'} head")
                if not num_chunks:
                    _check_head(chunk.head, key, copy)
                    wanted_crc = chunk.head.crc32
                if not 0 < len(data) <= len(bytes_B) - filled:
                    raise CorruptWeights(
                        f"copy {key}: a chunk of {len(data)} bytes, {len(bytes_B) - filled} of {name} are missing"
                    )
                bytes_B[filled : filled + len(data)] = memoryview(data)
                crc = zlib.crc32(data, crc)
                filled += len(data)
                num_chunks += 1
        if crc != wanted_crc:
            raise CorruptWeights(f"copy {key}: the bytes that came have checksum {crc:08x}, not {wanted_crc:08x}")
        copy.checksum = crc


async def _next(call: grpc.aio.UnaryStreamCall, key: CopyKey) -> tuple[expert_pb2.ExpertChunk, memoryview]:
    try:
        async with asyncio.timeout(CHUNK_TIMEOUT_S):
            buffer = await call.read()
    except TimeoutError as err:
        raise DeadlineExceeded(f"copy {key}: no chunk for {CHUNK_TIMEOUT_S} s") from err
    if buffer is grpc.aio.EOF:
        raise CorruptWeights(f"copy {key}: the stream ended before its last byte")
    try:
        return decode(expert_pb2.ExpertChunk, buffer)
    except InvalidRequest as err:
        raise CorruptWeights(f"copy {key}: {err}") from err


def _check_head(head: expert_pb2.CopyHead, key: CopyKey, copy: ExpertCopy) -> None:
    if (head.layer, head.expert) != key:
        raise CorruptWeights(f"copy {key}: the peer sends {(head.layer, head.expert)}")
    found = tuple((tensor.name, tensor.dtype, tuple(tensor.shape)) for tensor in head.tensors)
    if found != form_of(copy):
        raise CorruptWeights(f"copy {key}: the peer sends tensors {found}, expected {form_of(copy)}")
