"""The oracle: a model's own code in transformers, loaded on this machine's CPU, and its MoE blocks by layer name.

Blocks run with the plain (eager) experts of the modeling code. A quantised checkpoint is handed to transformers as
the unquantised one it stands for: transformers reads few of the formats itself, and not on every machine. So what is
compared there is what the block computes; that the formats are decoded right is held by tests/test_quantised.py.
"""

import inspect
import json
import re
from typing import Any

import torch
from torch import Tensor, nn

from protos.checkpoint import Checkpoint
from protos.errors import ExpertmeshError, UnsupportedModel
from protos.model import ModelSpec

_INDEX = re.compile(r"\.(?:layers|block|blocks)\.(\d+)\.")
_TOWERS = ("encoder", "decoder", "thinker", "talker")
_AUTO = ("IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "MULTIMODAL_LM", "CAUSAL_LM", "TOKEN_CLASSIFICATION")


class Reference:
    """The MoE blocks of a transformers model.

    Args:
        model: in evaluation mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._blocks = _moe_blocks(model)

    def block(self, layer: str) -> nn.Module:
        """The block of one MoE layer, by our name of the layer.

        Raises:
            UnsupportedModel: the layer has no MoE block there.
        """
        names = (layer, f"thinker.{layer}", f"decoder.{layer}")  # of models with a second tower that is not served
        block = next((self._blocks[name] for name in names if name in self._blocks), None)
        if block is None:
            name = type(self.model).__name__
            raise UnsupportedModel(f"layer {layer}: transformers' {name} has no MoE block there")
        return block

    @torch.no_grad()
    def output(self, layer: str, x_TD: Tensor, token_ids_T: Tensor | None = None) -> Tensor:
        """What the block of one MoE layer returns for x_TD [T, D], taken as one sequence.

        Args:
            layer: our name of it.
            token_ids_T: int64, for gates that look experts up.

        Raises:
            UnsupportedModel: the layer has no MoE block there.
        """
        block = self.block(layer)
        if type(block).__name__ == "NllbMoeSparseMLP":
            return _nllb_output(block, x_TD)
        extra = {}
        if token_ids_T is not None and "input_ids" in inspect.signature(type(block).forward).parameters:
            extra["input_ids"] = token_ids_T[None]
        y = block(x_TD[None], **extra)
        y_1TD: Tensor = y[0] if isinstance(y, tuple) else y
        return y_1TD.reshape(x_TD.shape)


def load_reference(spec: ModelSpec) -> Reference:
    """The model as transformers loads it.

    Raises:
        UnsupportedModel: transformers cannot load it.
    """
    import transformers  # slow to import

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        config = _config(spec)
        options: dict[str, Any] = {"experts_implementation": "eager", "local_files_only": True, "config": config}
        if spec.quantisation or spec.blocks[spec.layers[0]].gate.num_identity:
            for part in (config, config.get_text_config()):
                part.__dict__.pop("quantization_config", None)
            options |= {"state_dict": _unquantised(spec), "dtype": getattr(torch, spec.dtype)}
            model: nn.Module = _model_class(config).from_pretrained(None, **options)
        else:
            model = _model_class(config).from_pretrained(spec.path, dtype="auto", **options)
    except ExpertmeshError:
        raise
    except Exception as err:
        reason = " ".join(str(err).split())[:500]
        raise UnsupportedModel(f"model {spec.path}: transformers cannot load it: {reason}") from err
    model.requires_grad_(False)
    model.eval()
    return Reference(model)


def _config(spec: ModelSpec) -> Any:
    """The model's configuration; of a family whose code is not in transformers, that of the class equal to it.

    Raises:
        UnsupportedModel: transformers has no class that computes the same.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    gate = spec.blocks[spec.layers[0]].gate
    equal = {"kimi_k2": "deepseek_v3"} | ({"deepseek": "deepseek_v2"} if gate.renorm == "none" else {})
    if spec.family in equal:
        values = json.loads((spec.path / "config.json").read_bytes())
        for key in ("model_type", "auto_map", "architectures"):
            values.pop(key, None)
        return CONFIG_MAPPING[equal[spec.family]].from_dict(values)
    if spec.family in ("grok-1", "deepseek"):
        raise UnsupportedModel(f"model {spec.path}: transformers has no class of {spec.family} to compare with")
    return AutoConfig.from_pretrained(spec.path, local_files_only=True)


def _model_class(config: Any) -> Any:
    """The class of users' checkpoints: the composite model where the family has one."""
    import transformers
    from transformers.models.auto import modeling_auto

    for kind in _AUTO:
        names: dict[str, str] = getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES")
        if config.model_type in names:
            return getattr(transformers, names[config.model_type])
    return transformers.AutoModelForCausalLM


def _unquantised(spec: ModelSpec) -> dict[str, Tensor]:
    """Tensors of the MoE blocks under the names they would have unquantised; the rest of the model is left out.

    Identity experts, which have no weights, get zeros: transformers 5.23 has rows for them, and never reads them.
    """
    checkpoint = Checkpoint(spec)
    tensors: dict[str, Tensor] = {}
    for layer, block in spec.blocks.items():
        tensors |= dict(checkpoint.unquantised(layer))
        last = block.gate.num_experts - 1
        for name in [name for name in tensors if f".experts.{last}." in name and ".down_proj" not in name]:
            for identity in range(last + 1, last + 1 + block.gate.num_identity):
                tensors[name.replace(f".experts.{last}.", f".experts.{identity}.")] = torch.zeros_like(tensors[name])
    return tensors


class _GemmaMoE(nn.Module):
    """The MoE half of a Gemma 4 decoder layer, which has no block class, with one input for router and experts."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.router, self.experts = layer.router, layer.experts

    def forward(self, x_1TD: Tensor) -> Tensor:
        x_TD = x_1TD.reshape(-1, x_1TD.shape[-1])
        _, weight_TK, expert_TK = self.router(x_TD)
        y_TD: Tensor = self.experts(x_TD, expert_TK, weight_TK)
        return y_TD


def _moe_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The MoE blocks of `model` by layer name; a model with two towers of them names the tower first."""
    paths: list[str] = []
    for path, module in model.named_modules():
        has_router = hasattr(module, "gate") or hasattr(module, "router")
        is_block = type(module).__name__ == "JetMoeMoE" or (hasattr(module, "experts") and has_router)
        if is_block and not any(path.startswith(f"{outer}.") for outer in paths) and _INDEX.search(f"{path}."):
            paths.append(path)
    towers = {_tower(path) for path in paths}
    found: dict[str, nn.Module] = {}
    for path in paths:
        match = _INDEX.search(f"{path}.")
        assert match is not None, "only such paths were taken"
        prefix = f"{_tower(path)}." if len(towers) > 1 and _tower(path) else ""
        block = model.get_submodule(path)
        found.setdefault(prefix + match[1], _GemmaMoE(block) if hasattr(block, "self_attn") else block)
    return found


def _tower(path: str) -> str:
    return next((part for part in path.split(".") if part in _TOWERS), "")


def _nllb_output(block: Any, x_TD: Tensor) -> Tensor:
    """The sum that NLLB-MoE defines (arXiv:2207.04672): over a token's kept experts, probability x expert(x).

    Router and experts are the block's own. Its forward in transformers 5.23 computes another sum: it hands the one-hot
    mask of the first choice to its experts as if that held expert ids.
    """
    _, probability_TE, _ = block.router(x_TD)
    y_TD = torch.zeros_like(x_TD)
    for expert in range(block.num_experts):
        (token_N,) = torch.where(probability_TE[:, expert] > 0)
        part_ND = block.experts[f"expert_{expert}"](x_TD[token_N]) * probability_TE[token_N, expert, None]
        y_TD.index_add_(0, token_N, (part_ND * (1 - block.experts.moe_token_dropout)).to(y_TD.dtype))
    return y_TD
