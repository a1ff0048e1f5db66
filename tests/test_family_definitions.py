"""Families that transformers 5.23 has no class of, against their own definitions, written here in plain torch.

Grok-1: xai-org/grok-1, model.py, with the names of its Hugging Face port. DeepSeek-MoE 16B: arXiv:2401.06066 and the
modeling_deepseek.py of its repository. Kimi-K2: the block of DeepSeek-V3 (arXiv:2412.19437) without groups.

Shapes: T tokens, D model dim, F expert hidden dim, E experts, K top-k.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from cluster.local_layer import LocalLayer
from protos.checkpoint import read_model
from protos.errors import UnsupportedModel

DIM, WIDTH, NUM_EXPERTS, TOP_K, NUM_TOKENS = 32, 24, 8, 2, 33

GROK_1: dict[str, Any] = {
    "model_type": "grok-1",
    "architectures": ["Grok1ModelForCausalLM"],
    "hidden_size": DIM,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 1,
    "num_experts": NUM_EXPERTS,
    "num_experts_per_tok": TOP_K,
    "attn_output_multiplier": 0.08838834764831845,
    "output_multiplier_scale": 0.5773502691896257,
    "max_attn_value": 30.0,
}
DEEPSEEK: dict[str, Any] = {
    "model_type": "deepseek",
    "hidden_size": DIM,
    "intermediate_size": 4 * WIDTH,
    "moe_intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_routed_experts": NUM_EXPERTS,
    "n_shared_experts": 2,
    "num_experts_per_tok": TOP_K,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "hidden_act": "silu",
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
}
KIMI_K2: dict[str, Any] = DEEPSEEK | {
    "model_type": "kimi_k2",
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}


def random(seed: int, *shape: int, std: float = 0.2) -> Tensor:
    return std * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def grok_tensors() -> dict[str, Tensor]:
    block = "model.layers.0.moe_block"
    tensors = {f"{block}.gate.weight": random(0, NUM_EXPERTS, DIM)}
    for expert in range(NUM_EXPERTS):
        for i, (name, shape) in enumerate(
            {"linear": (WIDTH, DIM), "linear_v": (WIDTH, DIM), "linear_1": (DIM, WIDTH)}.items()
        ):
            tensors[f"{block}.experts.{expert}.{name}.weight"] = random(10 * expert + i + 1, *shape)
    return tensors


def deepseek_tensors(num_shared: int, *, biased: bool) -> dict[str, Tensor]:
    """Layer 0 is dense, layer 1 has experts and a shared expert as wide as `num_shared` of them."""
    tensors = {"model.layers.1.mlp.gate.weight": random(0, NUM_EXPERTS, DIM)}
    if biased:
        tensors["model.layers.1.mlp.gate.e_score_correction_bias"] = random(1, NUM_EXPERTS)
    mlps = {"model.layers.0.mlp": 4 * WIDTH, "model.layers.1.mlp.shared_experts": num_shared * WIDTH}
    mlps |= {f"model.layers.1.mlp.experts.{expert}": WIDTH for expert in range(NUM_EXPERTS)}
    for i, (name, width) in enumerate(mlps.items()):
        tensors[f"{name}.gate_proj.weight"] = random(10 * i + 2, width, DIM)
        tensors[f"{name}.up_proj.weight"] = random(10 * i + 3, width, DIM)
        tensors[f"{name}.down_proj.weight"] = random(10 * i + 4, DIM, width)
    return tensors


def write(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors")


def served(path: Path, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Our output, and our gate's weights as [T, E]."""
    spec = read_model(path)
    y_TD, routing = LocalLayer(spec, spec.layers[-1])(x_TD)
    index_TK = torch.from_numpy(routing.expert_TK).long()
    return y_TD, torch.zeros(len(x_TD), NUM_EXPERTS).scatter_(1, index_TK, torch.from_numpy(routing.weight_TK))


def assert_is(path: Path, x_TD: Tensor, expected_TD: Tensor, weight_TE: Tensor) -> None:
    y_TD, ours_TE = served(path, x_TD)
    assert torch.equal(ours_TE != 0, weight_TE != 0)
    assert (ours_TE - weight_TE).abs().max() <= 1e-6
    assert (y_TD - expected_TD).abs().max() <= 1e-5 * expected_TD.abs().max()


def keep_top(score_TE: Tensor, choice_TE: Tensor) -> Tensor:
    """score_TE where choice_TE is among the K best of its token, else 0."""
    least_T1 = choice_TE.sort(dim=-1, descending=True).values[:, TOP_K - 1 : TOP_K]
    return score_TE * (choice_TE >= least_T1)


def swiglu(tensors: dict[str, Tensor], name: str, x_TD: Tensor) -> Tensor:
    gate_TF, up_TF = (x_TD @ tensors[f"{name}.{part}_proj.weight"].T for part in ("gate", "up"))
    return (F.silu(gate_TF) * up_TF) @ tensors[f"{name}.down_proj.weight"].T


@pytest.mark.parametrize(("hidden_act", "approximate"), [(None, "tanh"), ("gelu", "none")])
def test_grok_1_weighs_the_two_best_experts_by_their_probabilities(
    hidden_act: str | None, approximate: str, tmp_path: Path
) -> None:
    """Not renormalised; GELU in jax's default form (tanh), or in the exact one that the port computes if asked for."""
    tensors = grok_tensors()
    write(tmp_path, GROK_1 | ({"hidden_act": hidden_act} if hidden_act else {}), tensors)
    x_TD = random(99, NUM_TOKENS, DIM, std=1.0)
    block = "model.layers.0.moe_block"
    score_TE = torch.softmax(x_TD @ tensors[f"{block}.gate.weight"].T, dim=-1)
    weight_TE = keep_top(score_TE, score_TE)
    expected_TD = torch.zeros_like(x_TD)
    for expert in range(NUM_EXPERTS):
        linear, linear_v, linear_1 = (
            tensors[f"{block}.experts.{expert}.{name}.weight"] for name in ("linear", "linear_v", "linear_1")
        )
        hidden_TF = F.gelu(x_TD @ linear.T, approximate=approximate) * (x_TD @ linear_v.T)
        expected_TD += weight_TE[:, expert, None] * (hidden_TF @ linear_1.T)
    assert_is(tmp_path, x_TD, expected_TD, weight_TE)


@pytest.mark.parametrize("renorm", [False, True])
def test_deepseek_moe_adds_its_shared_experts_to_the_chosen(renorm: bool, tmp_path: Path) -> None:
    tensors = deepseek_tensors(2, biased=False)
    write(tmp_path, DEEPSEEK | {"norm_topk_prob": renorm}, tensors)
    x_TD = random(99, NUM_TOKENS, DIM, std=1.0)
    score_TE = torch.softmax(x_TD @ tensors["model.layers.1.mlp.gate.weight"].T, dim=-1)
    weight_TE = keep_top(score_TE, score_TE)
    if renorm:
        weight_TE = weight_TE / (weight_TE.sum(dim=-1, keepdim=True) + 1e-20)
    expected_TD = swiglu(tensors, "model.layers.1.mlp.shared_experts", x_TD)
    for expert in range(NUM_EXPERTS):
        expected_TD += weight_TE[:, expert, None] * swiglu(tensors, f"model.layers.1.mlp.experts.{expert}", x_TD)
    assert_is(tmp_path, x_TD, expected_TD, weight_TE)


def test_kimi_k2_chooses_by_biased_scores_and_weighs_by_unbiased_ones(tmp_path: Path) -> None:
    tensors = deepseek_tensors(1, biased=True)
    write(tmp_path, KIMI_K2, tensors)
    x_TD = random(99, NUM_TOKENS, DIM, std=1.0)
    score_TE = torch.sigmoid(x_TD @ tensors["model.layers.1.mlp.gate.weight"].T)
    weight_TE = keep_top(score_TE, score_TE + tensors["model.layers.1.mlp.gate.e_score_correction_bias"])
    weight_TE = 2.827 * weight_TE / (weight_TE.sum(dim=-1, keepdim=True) + 1e-20)
    expected_TD = swiglu(tensors, "model.layers.1.mlp.shared_experts", x_TD)
    for expert in range(NUM_EXPERTS):
        expected_TD += weight_TE[:, expert, None] * swiglu(tensors, f"model.layers.1.mlp.experts.{expert}", x_TD)
    assert_is(tmp_path, x_TD, expected_TD, weight_TE)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (GROK_1, {"hidden_act": "gelu_fast"}, "hidden_act is 'gelu_fast'"),
        (GROK_1, {"norm_topk_prob": True}, "norm_topk_prob is True, an option that grok-1 does not have"),
        (GROK_1, {"moe_router_logit_softcapping": 30.0}, "moe_router_logit_softcapping is 30.0, an option that grok-1"),
        (GROK_1, {"num_shared_experts": 1}, "num_shared_experts is 1, an option that grok-1 does not have"),
        (DEEPSEEK, {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid' .supported for deepseek: 'softmax'"),
        (DEEPSEEK, {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc', an option that deepseek does not have"),
        (DEEPSEEK, {"n_group": 4}, "n_group is 4, an option that deepseek does not have"),
        (DEEPSEEK, {"routed_scaling_factor": 16.0}, "routed_scaling_factor is 16.0, an option that deepseek does not"),
        (DEEPSEEK, {"n_shared_experts": None}, "shared_experts.* config.json describes a model without shared"),
        (KIMI_K2, {"scoring_func": "softmax"}, "scoring_func is 'softmax' .supported for kimi_k2: 'sigmoid'"),
        (KIMI_K2, {"topk_method": "greedy"}, "topk_method is 'greedy' .supported for kimi_k2: 'noaux_tc'"),
        (KIMI_K2, {"n_group": None}, "n_group is None .supported for kimi_k2: an integer"),
    ],
)
def test_what_the_definition_does_not_say_is_refused(
    config: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    biased = config is KIMI_K2
    tensors = grok_tensors() if config is GROK_1 else deepseek_tensors(1 if biased else 2, biased=biased)
    write(tmp_path, config, tensors)
    read_model(tmp_path)
    write(tmp_path, config | changes, tensors)
    with pytest.raises(UnsupportedModel, match=message) as refusal:
        read_model(tmp_path)
    assert "\n" not in refusal.value.message
