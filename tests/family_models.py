"""A tiny random model of every MoE family of transformers, written as users have it, with its own blocks as oracle."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from tests.family_blocks import find_blocks, run_block
from tests.family_cases import CASES, FamilyCase
from tests.family_configs import tiny_config
from tests.family_hub import to_hub
from tests.family_weights import randomise

transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]

FAMILIES: tuple[str, ...] = tuple(CASES)

_AUTO = ("IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "MULTIMODAL_LM", "CAUSAL_LM", "TOKEN_CLASSIFICATION")


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyModel:
    """One case as transformers holds it: `layers` are the MoE blocks inside `model`, by layer name."""

    name: str
    path: Path
    model: nn.Module
    layers: dict[str, nn.Module]


def build_family(
    name: str,
    path: Path,
    *,
    dtype: str = "float32",
    seed: int = 0,
    memory_layout: bool = False,
    sharded: bool = False,
) -> FamilyModel:
    """Build the case `name` with random weights and write it to `path` as config.json and safetensors.

    Args:
        name: one of FAMILIES.
        path: the directory; created if absent.
        dtype: of the weights; what the family keeps in float32 (selection biases first of all) stays float32.
        seed: of the weights.
        memory_layout: write the names and shapes of transformers' memory instead of the hub's.
        sharded: several files and an index instead of one file.
    """
    case = CASES[name]
    model = _random_model(case, getattr(torch, dtype), seed)
    shard = "100KB" if sharded else "5GB"
    model.save_pretrained(path, max_shard_size=shard, save_original_format=not memory_layout)
    if not memory_layout:
        to_hub(path, case.model_type, max_shard_size=shard)
    return FamilyModel(name=name, path=path, model=model, layers=find_blocks(model))


def block_output(fm: FamilyModel, layer: str, x_TD: Tensor, token_ids_T: Tensor | None = None) -> Tensor:
    """What transformers' block returns for x_TD [T, D], taken as one sequence: routed and shared experts.

    Not in it, for the decoder layer adds them outside the block: shared_mlp of granitemoeshared, granitemoehybrid and
    granitemoe_swa, the dense MLPs of longcat_flash, and what tests/family_blocks.py says of Gemma. nllb_moe gives the
    sum that its paper defines instead of what transformers 5.23 computes.

    Args:
        fm: from build_family.
        layer: a key of fm.layers.
        x_TD: in the dtype of the model.
        token_ids_T: int64, for hash layers (deepseek_v4:hash); ignored by all others.
    """
    return run_block(fm.layers[layer], x_TD, token_ids_T)[0]


def block_routing(
    fm: FamilyModel, layer: str, x_TD: Tensor, token_ids_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The experts [T, K] (int64; -1: dropped, weight 0) and the weights [T, K] that the block hands to its experts.

    They multiply the experts' outputs (llama4: inputs). Ids past the last expert are longcat_flash's identities.
    Arguments as of block_output.
    """
    _, expert_TK, weight_TK = run_block(fm.layers[layer], x_TD, token_ids_T)
    return expert_TK, weight_TK


def model_class(config: transformers.PreTrainedConfig) -> Any:
    """The class of users' checkpoints: the composite model where the family has one."""
    for kind in _AUTO:
        names: dict[str, str] = getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES")
        if config.model_type in names:
            return getattr(transformers, names[config.model_type])
    raise LookupError(config.model_type)


def _random_model(case: FamilyCase, dtype: torch.dtype, seed: int) -> transformers.PreTrainedModel:
    config = tiny_config(case.model_type, case.config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: transformers.PreTrainedModel = model_class(config)._from_config(
            config, dtype=dtype, experts_implementation="eager"
        )
    kept = model._get_dtype_plan(dtype)  # what from_pretrained holds in float32 whatever the dtype
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if any(pattern in name for pattern in kept):
            tensor.data = tensor.data.float()
    generator = torch.Generator().manual_seed(seed)
    for block in find_blocks(model).values():
        randomise(block, router_std=case.router_std, generator=generator)
    model.train(False).requires_grad_(False)
    return model
