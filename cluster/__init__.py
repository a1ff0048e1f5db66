"""The control path on Ray: application, placement, planner, scaling, command line. Imports all; nobody imports it.

`__all__` names the modules that users may import: `cluster.app:build` is what Serve deploys.
"""

__all__ = ["app", "config"]
