"""Settings of one router, and the policy for what exceeds capacity."""

from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from protos.errors import InvalidRequest

Step = Literal["copy", "wait", "next_expert", "drop", "fail"]
UnavailableStep = Literal["wait", "next_expert", "drop", "fail"]
Keep = Literal["score", "position", "random"]

_FINAL = ("drop", "fail")


class OverflowConfig(BaseModel):
    """What happens to routed pairs beyond an expert's capacity. Capacity factor: arXiv:2006.16668, 2101.03961."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    chain: tuple[Step, ...] = Field(
        default=("copy", "wait", "fail"),
        description="steps tried in order for a pair that exceeds capacity or that every copy refuses; the default "
        "is lossless: an operator opts in to rerouting and dropping",
    )
    capacity_factor: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="pairs per copy and batch = ceil(capacity_factor * T * K / E); null is dropless, because servers "
        "bound their queues themselves",
    )
    min_capacity: int = Field(
        default=4, ge=1, description="pairs per copy and batch at least, so that small batches are not cut to pieces"
    )
    keep: Keep = Field(
        default="score",
        description="who keeps the capacity: the highest gate weights, the first tokens (Switch), or a random draw",
    )
    max_score_gap: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="next_expert: largest gate score lost by the substitute; null sets no limit",
    )
    renormalize: bool = Field(
        default=False,
        description="after a drop, scale the token's remaining weights to their original sum; off keeps each "
        "remaining term exactly as the model computes it",
    )
    unavailable_chain: tuple[UnavailableStep, ...] = Field(
        default=("wait", "fail"),
        description="steps for pairs of an expert without a live copy; wait means until a placement has one",
    )

    @model_validator(mode="after")
    def _chains_can_be_walked(self) -> Self:
        chains: tuple[tuple[str, tuple[str, ...]], ...] = (
            ("chain", self.chain),
            ("unavailable_chain", self.unavailable_chain),
        )
        for name, chain in chains:
            if not chain:
                raise ValueError(f"{name} is empty (it needs at least one step)")
            for i, step in enumerate(chain):
                if step in chain[:i]:
                    raise ValueError(f"{name} {list(chain)} names {step!r} twice")
                if step in _FINAL and i + 1 < len(chain):
                    raise ValueError(f"{name} {list(chain)} has {chain[i + 1]!r} after {step!r}, which always ends it")
        return self

    @property
    def needs_scores(self) -> bool:
        """Whether a chain may look for another expert, which takes the gate's scores."""
        return "next_expert" in self.chain or "next_expert" in self.unavailable_chain

    def override(
        self,
        *,
        chain: Sequence[str] = (),
        capacity_factor: float | None = None,
        max_score_gap: float | None = None,
        renormalize: bool | None = None,
        keep: str | None = None,
    ) -> "OverflowConfig":
        """This policy with the fields that one request sets; absent ones (None, empty chain) stay.

        Raises:
            InvalidRequest: the result is not a valid policy; the message names field and value.
        """
        wanted: dict[str, Any] = {
            "chain": tuple(chain) or None,
            "capacity_factor": _shortest(capacity_factor),
            "max_score_gap": _shortest(max_score_gap),
            "renormalize": renormalize,
            "keep": keep,
        }
        given = {name: value for name, value in wanted.items() if value is not None}
        if not given:
            return self
        try:
            return OverflowConfig.model_validate(self.model_dump() | given)
        except ValidationError as err:
            raise InvalidRequest(f"overflow policy: {_first_error(err)}") from err


class RouterConfig(BaseModel):
    """How one router works. Defaults suit a laptop."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    overflow: OverflowConfig = Field(
        default=OverflowConfig(), description="the operator's overflow policy; a request may override parts of it"
    )
    max_request_tokens: int = Field(
        default=8192, gt=0, description="tokens of one request; more is refused, so that one caller cannot fill memory"
    )
    max_batch_tokens: int = Field(
        default=8192, gt=0, description="tokens merged into one batch: bounds the time that small requests wait for it"
    )
    max_queued_tokens: int = Field(
        default=65536, gt=0, description="tokens accepted and not yet answered; beyond it requests get Overloaded"
    )
    max_batches_in_flight: int = Field(
        default=2, gt=0, description="batches per layer: one computes while the next is gated; more would merge less"
    )
    chunk_bytes: int = Field(
        default=1 << 20,
        gt=0,
        description="bytes of hidden states per message: chunks travel while others compute, one large message cannot",
    )
    partial_dtype: Literal["float32", "model"] = Field(
        default="float32", description="dtype of partial sums on the wire; model halves the bytes, adds a rounding"
    )
    default_timeout_s: float = Field(
        default=30.0, gt=0, allow_inf_nan=False, description="seconds a request may take where it does not say"
    )
    hop_timeout_s: float = Field(
        default=2.0,
        gt=0,
        allow_inf_nan=False,
        description="seconds without an answer from an expert server after which its rows go to other copies",
    )
    compute_threads: int | None = Field(
        default=None, ge=1, description="torch threads of this process; null leaves torch's default"
    )

    trace_dir: str | None = Field(
        default=None, description="directory for a trace of what the gates decide (Parquet); null records nothing"
    )
    trace_share: float = Field(
        default=0.01, gt=0, le=1, description="share of the tokens that the trace samples, each layer by itself"
    )
    trace_max_bytes: int = Field(
        default=256 << 20, ge=1 << 20, description="bytes of all trace files in trace_dir; the oldest are removed"
    )
    trace_file_s: float = Field(
        default=60.0,
        gt=0,
        allow_inf_nan=False,
        description="seconds after which a trace file is finished: what a crash loses at most",
    )

    @model_validator(mode="after")
    def _largest_request_fits(self) -> Self:
        if self.max_queued_tokens < self.max_request_tokens:
            raise ValueError(
                f"max_queued_tokens ({self.max_queued_tokens}) is below max_request_tokens "
                f"({self.max_request_tokens}): the largest request would never be accepted"
            )
        return self


def _shortest(value: float | None) -> float | None:
    """The decimal a float32 field was written from: 1.1, not 1.10000002, which would buy one more pair at ceil()."""
    return None if value is None else float(str(np.float32(value)))


def _first_error(err: ValidationError) -> str:
    first = err.errors()[0]
    field = ".".join(map(str, first["loc"]))
    return f"{field} is {first['input']!r}: {first['msg']}" if field else first["msg"].removeprefix("Value error, ")
