"""Settings of one expert server."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ExpertServerConfig(BaseModel):
    """What one expert server may use and how it works. Defaults suit a laptop."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    budget_bytes: int = Field(
        default=1 << 30, gt=0, description="bytes of memory for expert copies; a load beyond it is refused"
    )
    device: str = Field(default="auto", description="torch device; auto takes cuda where there is one, else cpu")
    compute_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="dtype of the expert GEMMs; auto measures once at start and takes the faster"
    )
    weight_dtype: Literal["compute", "int8", "int4", "fp8"] = Field(
        default="compute",
        description="how expert weights stay in memory: in the compute dtype, or packed on load to fit more experts",
    )
    compute_threads: int | None = Field(
        default=None, ge=1, description="torch threads of this process; null leaves torch's default"
    )
    max_queue_tokens: int = Field(
        default=65536, gt=0, description="routed pairs waiting or running; beyond it requests get Overloaded"
    )
    max_launch_tokens: int = Field(
        default=8192, gt=0, description="rows merged into one launch: bounds the memory and the time of a launch"
    )
    inline_launch_s: float = Field(
        default=0.004,
        ge=0,
        description="launches expected to be shorter run on the event loop, which saves two hand-overs between threads",
    )
    emulated_tokens_per_s: float | None = Field(
        default=None,
        gt=0,
        description="EMULATION: pace the server to this many routed pairs per second, like a slower device",
    )
