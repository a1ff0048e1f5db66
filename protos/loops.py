"""Threads and loops of a server process: the data path on a loop of its own, and waiting for the end."""

import asyncio
import ctypes
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
import uvloop

T = TypeVar("T")

BACKGROUND_NICE = 10  # by which loading threads step back behind those that serve
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


class LoopThread:
    """An event loop in a daemon thread.

    A Serve replica shares its own loop with Serve's control calls, so gRPC data traffic gets this one.
    """

    def __init__(self, name: str) -> None:
        self._loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.running = False

    def start(self) -> None:
        """Start the thread. Once only."""
        self._thread.start()
        self.running = True

    def call(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Run a coroutine on the loop and wait for its result, from another thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout_s)

    def submit(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine on the loop soon, from any thread, without waiting for it."""
        asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def stop(self) -> None:
        """Cancel what still runs, end the loop and join the thread. Idempotent."""
        if not self.running:
            return
        self.running = False
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            pending = asyncio.all_tasks(self._loop)
            for task in pending:
                task.cancel()
            if pending:
                self._loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()


def compute_executor(name: str, torch_threads: int | None) -> ThreadPoolExecutor:
    """One thread for torch work away from an event loop.

    torch.set_num_threads reaches OpenMP for the calling thread only: a new thread would start as many workers as there
    are cores, and they spin between operations. So every thread that computes sets the number itself.
    """
    return ThreadPoolExecutor(1, thread_name_prefix=name, initializer=limit_torch_threads, initargs=(torch_threads,))


def background_executor(name: str) -> ThreadPoolExecutor:
    """One thread for work that must not slow down the others of this process: lower priority, one core."""
    return ThreadPoolExecutor(1, thread_name_prefix=name, initializer=_step_back)


def _step_back() -> None:
    limit_torch_threads(1)
    if sys.platform == "linux":  # where a thread has a priority of its own
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, min(os.getpriority(os.PRIO_PROCESS, thread) + BACKGROUND_NICE, 19))


async def give_way(is_busy: Callable[[], bool], at_most_s: float) -> None:
    """Let more urgent work of this process go first, for a while."""
    end_s = time.monotonic() + at_most_s
    while is_busy() and time.monotonic() < end_s:
        await asyncio.sleep(0.001)


def limit_torch_threads(torch_threads: int | None) -> None:
    """Use `torch_threads` threads for torch operations called from this thread; None leaves torch's default."""
    if torch_threads is not None:
        torch.set_num_threads(torch_threads)


def keep_freed_memory() -> None:
    """Let malloc keep what this process frees, for the next message of the same size. Does nothing without glibc.

    By default every buffer of a large message goes back to the kernel, and its pages are faulted in again for the next
    one: a quarter of the throughput of 2048-token calls.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest value glibc takes
    mallopt(_M_TRIM_THRESHOLD, 512 << 20)


def freeze_garbage_collector() -> None:
    """Collect once, and look no more at what lives now. Call it when a process is ready to serve or to measure.

    A full collection stops every thread of a process that holds torch and Ray for 0.1 to 0.3 s, whenever as many
    objects again as a quarter of theirs have come; almost all that it looks at lives until the end. Serve does the same
    in a replica that is ready.
    """
    gc.collect()
    gc.freeze()


def wait_for_end() -> None:
    """Block the main thread until SIGTERM, SIGINT or the end of standard input."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    threading.Thread(target=_read_to_end, args=(ended,), daemon=True).start()
    ended.wait()


def _read_to_end(ended: threading.Event) -> None:
    sys.stdin.read()
    ended.set()
