"""The request path: gate, capacity, dispatch, transport, combine, endpoint. Imports `protos`, and runs without Ray.

`__all__` names the modules that the other packages may import; the rest is private.
"""

__all__ = [
    "around",
    "capacity",
    "client",
    "combine",
    "config",
    "dispatch",
    "gate",
    "ledger",
    "replicas",
    "retry",
    "service",
    "shared",
    "snapshot",
    "table",
]
