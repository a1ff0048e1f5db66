"""One expert server: weights, batching, grouped compute, gRPC service. Imports `protos`, and runs without Ray.

`__all__` names the modules that the other packages may import; the rest is private.
"""

__all__ = ["batching", "compute", "config", "meters", "packed", "service", "weights"]
