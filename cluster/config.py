"""One YAML file describes a cluster: the model, the routers, the pools of expert servers, the placement."""

from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from experts.config import ExpertServerConfig
from protos.errors import InvalidRequest
from router.config import RouterConfig


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class RouterPoolConfig(_Config):
    """Router processes and where they listen."""

    host: str = Field(
        default="127.0.0.1",
        description="interface of the gRPC and HTTP endpoints; 0.0.0.0 opens them to other machines",
    )
    port: int = Field(
        default=0, ge=0, le=65535, description="gRPC port, shared by all routers of a node (SO_REUSEPORT); 0: any"
    )
    http_port: int = Field(
        default=8000, ge=1, le=65535, description="port of Serve's HTTP proxy, which has /status and /healthz"
    )
    route_prefix: str = Field(
        default="/", pattern=r"^/", description="HTTP path below which this cluster answers, if Serve has several"
    )
    num_replicas: int = Field(default=1, ge=1, description="router processes; they share nothing but the table")
    num_cpus: float = Field(default=0.5, ge=0, description="CPU cores that Ray reserves for one router")
    settings: RouterConfig = Field(default=RouterConfig(), description="how one router works")

    @model_validator(mode="after")
    def _one_free_port_for_one_router(self) -> Self:
        if self.num_replicas > 1 and self.port == 0:
            raise ValueError(f"num_replicas ({self.num_replicas}) needs a fixed port to share, but port is 0")
        return self


_SHORT = {"min": "min_servers", "max": "max_servers"}
_SHORT_SETTINGS = ("weight_dtype", "budget_bytes")


class PoolConfig(_Config):
    """Expert servers of one kind: how many, on what, and how they work.

    `min` and `max` are short for min_servers and max_servers, `budget_bytes` and `weight_dtype` for those of settings.
    """

    name: str = Field(
        default="default", pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", description="what status and log lines call it"
    )
    min_servers: int = Field(
        default=2,
        ge=0,
        description="expert servers at least; two survive the loss of one, 0 lets all go when nobody asks",
    )
    max_servers: int = Field(default=4, ge=1, description="expert servers at most")
    num_gpus: float = Field(default=0.0, ge=0, description="GPUs that Ray reserves for one server; 0 computes on CPU")
    num_cpus: float = Field(default=0.5, ge=0, description="CPU cores that Ray reserves for one server")
    resources: dict[str, float] = Field(
        default={}, description="custom resources that Ray reserves for one server, to choose its kind of node"
    )
    max_servers_per_node: int | None = Field(
        default=None, ge=1, le=100, description="servers on one node at most; 1 makes a node's loss cost one server"
    )
    drain_timeout_s: float = Field(
        default=20.0, gt=0, description="seconds a leaving server waits for others to take over its copies"
    )
    speed: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="speed of one server relative to the other pools': hot experts go to the fast; null is measured",
    )
    cost: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="cost of one server relative to the other pools': the pool that gives most for it grows first",
    )
    settings: ExpertServerConfig = Field(default=ExpertServerConfig(), description="how one expert server works")

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        found = {name: value for name, value in data.items() if name not in (*_SHORT, *_SHORT_SETTINGS)}
        for short, name in _SHORT.items():
            if short in data and data.get(name, data[short]) != data[short]:
                raise ValueError(f"{short} is given as {data[short]} and {name} as {data[name]}: they are the same")
            if short in data:
                found[name] = data[short]
        settings = data.get("settings") or {}
        for name in [name for name in _SHORT_SETTINGS if name in data]:
            if not isinstance(settings, dict) or settings.get(name, data[name]) != data[name]:
                raise ValueError(f"{name} is given here and, with another value, in settings")
            settings = settings | {name: data[name]}
        return found | ({"settings": settings} if "settings" in data or settings else {})

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        if self.max_servers < self.min_servers:
            raise ValueError(f"max_servers ({self.max_servers}) is below min_servers ({self.min_servers})")
        return self


class PlacementConfig(_Config):
    """How the placement sees its servers and moves copies."""

    heartbeat_s: float = Field(
        default=0.25, gt=0, le=5, description="seconds between reports; what load and liveness are seen with"
    )
    dead_after_s: float = Field(
        default=3.0, gt=0, description="seconds of silence after which a server is gone; routers notice losses sooner"
    )
    settle_s: float = Field(
        default=2.0, ge=0, description="seconds a (re)started placement waits at most for everyone to report"
    )
    plan_interval_s: float = Field(
        default=0.25, gt=0, description="seconds between plans; changes of members plan at once"
    )
    min_copies: int = Field(
        default=1, ge=0, description="live copies of every expert; 0: those without demand may have none"
    )
    max_copies: int | None = Field(default=None, ge=1, description="copies of one expert at most; null: one per server")
    max_moves: int = Field(
        default=16, ge=0, description="loads per plan for balance and survival; bounds the bytes a re-plan moves"
    )
    load_bytes_per_s: float | None = Field(
        default=float(1 << 30),
        gt=0,
        description="bytes per second that loads which only improve the placement may read; null: no limit",
    )
    survive: int = Field(
        default=0, ge=0, description="servers that may be lost at once without an expert; served from spare memory"
    )
    goal: float = Field(
        default=0.95, gt=0, lt=1, description="mean over most loaded server that a rebalanced layer is brought to"
    )
    rebalance_below: float = Field(
        default=0.9, gt=0, lt=1, description="a layer above this balance is left alone; near the goal it chases noise"
    )
    min_pairs_per_s: float = Field(
        default=50.0, ge=0, description="routed pairs per second of a layer below which its heat is noise"
    )
    load_rise_s: float = Field(
        default=0.3, gt=0, description="time constant for rising load: a hot spot counts at once"
    )
    load_fall_s: float = Field(
        default=5.0, gt=0, description="time constant for falling load: a pause keeps its copies"
    )

    @model_validator(mode="after")
    def _thresholds_in_order(self) -> Self:
        if self.rebalance_below > self.goal:
            raise ValueError(f"rebalance_below ({self.rebalance_below}) is above goal ({self.goal})")
        if self.max_copies is not None and self.max_copies < self.min_copies:
            raise ValueError(f"max_copies ({self.max_copies}) is below min_copies ({self.min_copies})")
        if self.dead_after_s < 2 * self.heartbeat_s:
            raise ValueError(
                f"dead_after_s ({self.dead_after_s}) is below two heartbeats (heartbeat_s is {self.heartbeat_s})"
            )
        return self


class ScalingConfig(_Config):
    """When the pool grows and shrinks."""

    target_busy: float = Field(default=0.6, gt=0, le=1, description="busy share to aim for when servers are added")
    upscale_busy: float = Field(
        default=0.8, gt=0, le=1, description="busy share from which servers are added; the gap keeps it steady"
    )
    drain_backlog_s: float = Field(
        default=2.0, gt=0, description="seconds in which a backlog should be worked off; a server's start takes as long"
    )
    downscale_delay_s: float = Field(
        default=30.0, ge=0, description="seconds the need must have been lower before servers go"
    )
    metrics_interval_s: float = Field(
        default=0.2, gt=0, description="seconds between the placement's decisions and their reports to Serve"
    )

    @model_validator(mode="after")
    def _thresholds_in_order(self) -> Self:
        if self.upscale_busy < self.target_busy:
            raise ValueError(f"upscale_busy ({self.upscale_busy}) is below target_busy ({self.target_busy})")
        return self


class ClusterConfig(_Config):
    """A whole cluster."""

    model: str = Field(description="model directory; every node must see it under this path")
    name: str = Field(
        default="expertmesh", pattern=r"^[A-Za-z0-9_-]+$", description="Serve application; one per cluster and model"
    )
    router: RouterPoolConfig = Field(default=RouterPoolConfig(), description="the routers")
    experts: PoolConfig = Field(default=PoolConfig(), description="the expert servers, where all are of one kind")
    pools: tuple[PoolConfig, ...] = Field(
        default=(),
        description="the expert servers of several kinds, in place of experts; each has the fields of experts",
    )
    placement: PlacementConfig = Field(default=PlacementConfig(), description="what lives where")
    scaling: ScalingConfig = Field(default=ScalingConfig(), description="how many servers")

    @property
    def all_pools(self) -> tuple[PoolConfig, ...]:
        """Every pool of expert servers, in order."""
        return self.pools or (self.experts,)

    @property
    def min_servers(self) -> int:
        """Expert servers at least, over all pools."""
        return sum(pool.min_servers for pool in self.all_pools)

    @property
    def weight_dtype(self) -> str:
        """How every pool keeps its weights: an answer must not depend on who computed it."""
        return self.all_pools[0].settings.weight_dtype

    def pool(self, name: str) -> PoolConfig:
        """The pool of that name; a KeyError names what there is."""
        found = {pool.name: pool for pool in self.all_pools}
        if name not in found:
            raise KeyError(f"no pool {name!r} (there are: {', '.join(found)})")
        return found[name]

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> Self:
        if self.pools and self.experts != PoolConfig():
            raise ValueError("experts and pools are both given: list every kind of server in pools")
        names = [pool.name for pool in self.pools]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"pools: two of them are named {twice[0]!r}")
        if len({pool.settings.weight_dtype for pool in self.pools}) > 1:
            kinds = ", ".join(f"{pool.name}: {pool.settings.weight_dtype}" for pool in self.pools)
            raise ValueError(f"pools differ in weight_dtype ({kinds}): an answer must not depend on who computed it")
        if len({pool.speed is None for pool in self.pools}) > 1:
            silent = next(pool.name for pool in self.pools if pool.speed is None)
            raise ValueError(f"pools: speed is given for some, but not for {silent!r}: give it for all or for none")
        return self


def load_config(path: Path, *, model: str | None = None) -> ClusterConfig:
    """Read a cluster's YAML file.

    Args:
        model: takes the place of the file's model, which may then be absent.

    Raises:
        InvalidRequest: the file cannot be read, is not YAML, or has a wrong field; one line names it.
    """
    try:
        data: Any = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as err:
        raise InvalidRequest(f"{path}: cannot be read ({getattr(err, 'strerror', None) or err})") from err
    except yaml.YAMLError as err:
        raise InvalidRequest(f"{path}: not YAML: {' '.join(str(err).split())}") from err
    if not isinstance(data, dict):
        raise InvalidRequest(f"{path}: expected a mapping of fields, got {type(data).__name__}")
    return parse_config(data if model is None else data | {"model": model}, where=str(path))


def parse_config(data: dict[str, Any], *, where: str = "config") -> ClusterConfig:
    """A cluster config from plain values.

    Raises:
        InvalidRequest: a field is missing, unknown or has a wrong value; one line names field, value and limit.
    """
    try:
        return ClusterConfig.model_validate(data)
    except ValidationError as err:
        first = err.errors()[0]
        field = ".".join(map(str, first["loc"]))
        problem = first["msg"].removeprefix("Value error, ")
        value = "" if first["type"] in ("missing", "value_error") else f" (got {first['input']!r})"
        more = f" ({err.error_count() - 1} more)" if err.error_count() > 1 else ""
        raise InvalidRequest(f"{where}: {field}: {problem}{value}{more}") from err
