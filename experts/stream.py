"""The sending side of one router's Compute stream: answers in order of completion, and pulses when there are none."""

import asyncio
from collections import deque
from dataclasses import dataclass, field

import grpc.aio

from protos import expert_pb2

PULSE_S = 0.2  # a stream with open calls hears from us at least this often

# A response without a call: tells the router that a server with a long queue is alive.
_PULSE = expert_pb2.ComputeResponse().SerializeToString()


@dataclass(slots=True, eq=False)
class ComputeStream:
    """The sending side of one router's Compute stream."""

    context: grpc.aio.ServicerContext
    out: deque[bytes] = field(default_factory=deque)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    open_calls: int = 0
    sent: int = 0  # messages so far
    pulsing: bool = False

    def send(self, message: bytes) -> None:
        self.sent += 1
        self.out.append(message)
        self.wake.set()

    async def write(self) -> None:
        while True:
            await self.wake.wait()
            self.wake.clear()
            while self.out:
                await self.context.write(self.out[0])
                self.out.popleft()  # only now: what is in `out` has not been written

    def call_opened(self) -> None:
        """From now until no call is open, send a pulse whenever PULSE_S went by without any message."""
        self.open_calls += 1
        if not self.pulsing:
            self.pulsing = True
            asyncio.get_running_loop().call_later(PULSE_S, self._pulse, self.sent)

    def _pulse(self, sent_before: int) -> None:
        if self.open_calls <= 0:
            self.pulsing = False
            return
        if self.sent == sent_before:
            self.send(_PULSE)
        asyncio.get_running_loop().call_later(PULSE_S, self._pulse, self.sent)
