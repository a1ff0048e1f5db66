"""Whether bytes of a file are in this node's page cache, and so as near as memory: mincore(2).

Another server of the node that has read an expert leaves its bytes there.
"""

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)


def resident_share(path: Path, begin: int, num_bytes: int) -> float:
    """Share of the pages of a range of a file that are in the page cache, 0..1; nothing is read.

    0 also where the kernel does not tell: it answers "all" for a file that this process neither owns nor may write
    (Linux 5.2, against spying on others' reads), and other systems than Linux are not asked.
    """
    if not num_bytes or not hasattr(_libc, "mincore"):
        return 0.0
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_uid != os.geteuid() and not os.access(path, os.W_OK):
                return 0.0
            start = begin - begin % mmap.ALLOCATIONGRANULARITY
            length = begin + num_bytes - start
            with mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=start) as mapped:
                return _resident_share(mapped, length)
    except (OSError, ValueError):  # gone, or shorter than it was: reading it will say so
        return 0.0


def _resident_share(mapped: mmap.mmap, length: int) -> float:
    view_B = np.frombuffer(mapped, dtype=np.uint8)  # only for the address
    address = ctypes.c_void_p(view_B.ctypes.data)
    del view_B  # a mapping with views cannot be closed
    pages = np.zeros(-(-length // mmap.PAGESIZE), dtype=np.uint8)
    failed = _libc.mincore(address, ctypes.c_size_t(length), ctypes.c_void_p(pages.ctypes.data))
    return 0.0 if failed else float((pages & 1).mean())
