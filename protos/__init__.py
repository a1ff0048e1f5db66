"""The contracts of expertmesh: messages, services, errors, tensors on the wire, and what a model is.

Imports nothing of ours. `__all__` names the modules that the other packages may import; the rest is private.
"""

__all__ = [
    "activations",
    "checkpoint",
    "codec",
    "common_pb2",
    "errors",
    "expert_pb2",
    "loops",
    "model",
    "pages",
    "router_pb2",
    "services",
    "stored",
    "tracefile",
]
