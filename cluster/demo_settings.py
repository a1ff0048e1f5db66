"""How large the demo is, what it reads and what it deploys."""

import socket
from dataclasses import dataclass
from pathlib import Path

from cluster.config import ClusterConfig, parse_config
from protos.model import ModelSpec

NAME = "expertmesh-demo"
FIRST_DOMAIN, SECOND_DOMAIN = "german", "table"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How large the demo is. The defaults suit two cores."""

    min_servers: int = 2
    max_servers: int = 4
    spare_nodes: int = 1  # nodes kept beyond min_servers: the first new server need not wait for a machine
    emulated_pairs_per_s: float = 1500.0  # of one server
    budget_copies: int = 48  # memory of one server
    tokens_per_request: int = 32
    max_open_requests: int = 96  # more wait at the client: the backlog of a slow machine must not grow without end
    light_tokens_per_s: float = 256.0
    heavy_tokens_per_s: float = 2100.0
    overflow_capacity_factor: float = 1.0
    overflow_max_score_gap: float = 0.15
    check_share: float = 0.15
    warm_up_s: float = 4.0
    at_least_s: float = 6.0  # each later phase
    at_most_s: float = 45.0  # each later phase


def cluster_config(settings: Settings, spec: ModelSpec) -> ClusterConfig:
    """The cluster of the demo: one (fake) GPU and one server per node."""
    copy_bytes = spec.expert_params * 4
    return parse_config(
        {
            "model": str(spec.path),
            "name": NAME,
            "router": {
                "http_port": _free_port(),
                "num_cpus": 0.1,
                "settings": {"compute_threads": 1, "max_batch_tokens": 512},
            },
            "experts": {
                "min_servers": settings.min_servers,
                "max_servers": settings.max_servers,
                "num_gpus": 1,
                "num_cpus": 0.1,
                "max_servers_per_node": 1,
                "drain_timeout_s": 10,
                "settings": {
                    "device": "cpu",
                    "budget_bytes": settings.budget_copies * copy_bytes,
                    "compute_threads": 1,
                    "emulated_tokens_per_s": settings.emulated_pairs_per_s,
                },
            },
            # Light load is not worth extra copies: every expert starts with one.
            "placement": {"min_pairs_per_s": 3 * settings.light_tokens_per_s, "load_fall_s": 3.0},
            "scaling": {"downscale_delay_s": 8},
        }
    )


def demo_files(root: Path) -> tuple[Path, dict[str, Path]]:
    """The demo model and its texts below the repository's root."""
    examples = root / "examples"
    return examples / "demo_model", {name: examples / "texts" / f"{name}.txt" for name in (FIRST_DOMAIN, SECOND_DOMAIN)}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
