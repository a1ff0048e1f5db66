"""The tiny family models: each builds, is written as users have it, and its blocks tell output and routing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from tests.family_blocks import find_blocks
from tests.family_configs import DIM
from tests.family_models import FAMILIES, FamilyModel, block_output, block_routing, build_family

NUM_TOKENS = 21
READ_BACK = (
    "mixtral",
    "qwen3_5_moe",
    "qwen3_vl_moe",
    "deepseek_v3",
    "gpt_oss",
    "granitemoe",
    "llama4",
    "lfm2_moe",
    "nemotron_h:latent",
    "deepseek_v4:hash",
    "step3p7",
    "ernie4_5_vl_moe",
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tokens(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x_TD = torch.randn(NUM_TOKENS, DIM, generator=generator).to(dtype)
    return x_TD, torch.randint(128, (NUM_TOKENS,), generator=generator)


def tensors(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_all_families_but_doge_and_zaya_have_a_case() -> None:
    assert len({name.partition(":")[0] for name in FAMILIES}) == 70


@pytest.mark.parametrize("name", FAMILIES)
def test_every_case_builds_and_its_blocks_answer(name: str, tmp_path: Path) -> None:
    fm = build_family(name, tmp_path)
    assert (tmp_path / "config.json").is_file()
    assert (tmp_path / "model.safetensors").is_file()
    assert fm.layers
    x_TD, ids_T = tokens()
    for layer in fm.layers:
        output_TD = block_output(fm, layer, x_TD, ids_T)
        expert_TK, weight_TK = block_routing(fm, layer, x_TD, ids_T)
        assert output_TD.shape == x_TD.shape
        assert torch.isfinite(output_TD).all()
        assert expert_TK.dtype == torch.int64
        assert expert_TK.shape == weight_TK.shape
        assert torch.isfinite(weight_TK).all()
        assert ((expert_TK >= 0) | ((expert_TK == -1) & (weight_TK == 0))).all()
        assert all(len(set(row)) == len(row) for row in expert_TK.tolist() if -1 not in row)
        assert len(set(expert_TK.flatten().tolist())) > expert_TK.shape[1], "every token chose the same experts"


@pytest.mark.parametrize(
    ("name", "dtype", "sharded"),
    [(name, "float32", False) for name in READ_BACK] + [(name, "bfloat16", True) for name in READ_BACK[:4]],
)
def test_from_pretrained_reads_the_same_model_back(name: str, dtype: str, sharded: bool, tmp_path: Path) -> None:
    fm = build_family(name, tmp_path, dtype=dtype, sharded=sharded)
    model, report = type(fm.model).from_pretrained(  # type: ignore[attr-defined]
        tmp_path, dtype="auto", experts_implementation="eager", output_loading_info=True
    )
    assert not any(report.values())
    again = FamilyModel(name=name, path=tmp_path, model=model.eval(), layers=find_blocks(model))
    x_TD, ids_T = tokens(getattr(torch, dtype))
    for layer in fm.layers:
        expected_TD = block_output(fm, layer, x_TD, ids_T)
        torch.testing.assert_close(block_output(again, layer, x_TD, ids_T), expected_TD, rtol=0, atol=1e-6)


def test_only_gemma_layers_stand_in_for_blocks(tmp_path: Path) -> None:
    aria, gemma = (build_family(name, tmp_path / name) for name in ("aria", "diffusion_gemma"))
    assert {type(block).__name__ for block in aria.layers.values()} == {"AriaTextMoELayer"}
    assert {type(block).__name__ for block in gemma.layers.values()} == {"GemmaMoE"}


def test_a_seed_fixes_the_weights(tmp_path: Path) -> None:
    first, same, other = (
        tensors(build_family("deepseek_v4:hash", tmp_path / run, seed=seed).path)
        for run, seed in (("first", 3), ("same", 3), ("other", 4))
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["layers.2.ffn.gate.weight"], other["layers.2.ffn.gate.weight"])


def test_memory_layout_writes_the_names_of_transformers(tmp_path: Path) -> None:
    hub, memory = (
        tensors(build_family("mixtral", tmp_path / str(layout), memory_layout=layout).path) for layout in (False, True)
    )
    experts = memory["model.layers.0.mlp.experts.gate_up_proj"]
    prefix = "model.layers.0.block_sparse_moe.experts.3"
    assert torch.equal(experts[3], torch.cat((hub[f"{prefix}.w1.weight"], hub[f"{prefix}.w3.weight"])))


def test_selection_biases_stay_in_float32(tmp_path: Path) -> None:
    written = tensors(build_family("glm4_moe", tmp_path, dtype="bfloat16").path)
    assert written["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert written["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16


def test_the_hub_has_no_matrices_for_identity_experts(tmp_path: Path) -> None:
    written = tensors(build_family("longcat_flash", tmp_path).path)
    assert not any(".experts.8." in name for name in written)
    assert written["model.layers.0.mlp.router.classifier.weight"].shape == (12, DIM)


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v4", "glm5_next", "hy_v4", "minimax_m3_vl", "step3p7"])
def test_clamps_bite(name: str, tmp_path: Path) -> None:
    fm = build_family(name, tmp_path)
    x_TD, ids_T = tokens()
    layer = list(fm.layers)[-1]
    experts: Any = fm.layers[layer].experts
    clamped_TD = block_output(fm, layer, x_TD, ids_T)
    for limit in {"limit", "swiglu_limit"} & vars(experts).keys():
        setattr(experts, limit, float("inf"))
    assert (block_output(fm, layer, x_TD, ids_T) - clamped_TD).abs().max() > 0.1


def test_group_limits_bite(tmp_path: Path) -> None:
    fm = build_family("deepseek_v3", tmp_path)
    gate: Any = fm.layers["1"].gate
    x_TD, _ = tokens()
    expert_TK, _ = block_routing(fm, "1", x_TD)
    free_TK = (F.linear(x_TD, gate.weight).sigmoid() + gate.e_score_correction_bias).topk(4, dim=-1).indices
    assert all(len({expert // 4 for expert in row}) <= 2 for row in expert_TK.tolist())
    assert any(set(row) != set(free) for row, free in zip(expert_TK.tolist(), free_TK.tolist(), strict=True))


def test_hash_layers_choose_by_token_id(tmp_path: Path) -> None:
    fm = build_family("deepseek_v4:hash", tmp_path)
    gate: Any = fm.layers["0"].gate
    x_TD, ids_T = tokens()
    assert torch.equal(block_routing(fm, "0", x_TD, ids_T)[0], gate.tid2eid[ids_T])


def test_jetmoe_routing_rebuilds_its_output(tmp_path: Path) -> None:
    fm = build_family("jetmoe", tmp_path)
    block: Any = fm.layers["1"]
    x_TD, _ = tokens()
    expert_TK, weight_TK = block_routing(fm, "1", x_TD)
    gate_TKF, up_TKF = torch.einsum("td,tkfd->tkf", x_TD, block.input_linear.weight[expert_TK]).chunk(2, dim=-1)
    out_TKD = torch.einsum("tkf,tkdf->tkd", F.silu(gate_TKF) * up_TKF, block.output_linear.weight[expert_TK])
    expected_TD = (weight_TK[..., None] * out_TKD).sum(dim=1) + block.bias
    torch.testing.assert_close(block_output(fm, "1", x_TD), expected_TD)


def test_llama4_weights_multiply_the_input(tmp_path: Path) -> None:
    fm = build_family("llama4:top_2", tmp_path)
    block: Any = fm.layers["1"]
    x_TD, _ = tokens()
    expert_TK, weight_TK = block_routing(fm, "1", x_TD)
    in_TKD = weight_TK[..., None] * x_TD[:, None]
    gate_TKF, up_TKF = torch.einsum("tkd,tkdf->tkf", in_TKD, block.experts.gate_up_proj[expert_TK]).chunk(2, dim=-1)
    out_TKD = torch.einsum("tkf,tkfd->tkd", F.silu(gate_TKF) * up_TKF, block.experts.down_proj[expert_TK])
    torch.testing.assert_close(block_output(fm, "1", x_TD), block.shared_expert(x_TD) + out_TKD.sum(dim=1))


def test_switch_drops_tokens_beyond_capacity_in_order(tmp_path: Path) -> None:
    fm = build_family("switch_transformers", tmp_path)
    x_TD, _ = tokens()
    expert_TK, weight_TK = block_routing(fm, "encoder.1", x_TD)
    block: Any = fm.layers["encoder.1"]
    chosen_T = block.router.classifier(x_TD).argmax(dim=-1)
    for expert in range(8):
        (token_N,) = torch.where(chosen_T == expert)
        assert (expert_TK[token_N[:3], 0] == expert).all()
        assert (expert_TK[token_N[3:], 0] == -1).all()
    dropped_T = expert_TK[:, 0] == -1
    assert dropped_T.any()
    assert (weight_TK[dropped_T] == 0).all()
    assert (block_output(fm, "encoder.1", x_TD)[dropped_T] == 0).all()


def test_nllb_sums_the_kept_experts_of_each_token(tmp_path: Path) -> None:
    x_TD, _ = tokens()
    roomy, tight = (build_family(name, tmp_path / name) for name in ("nllb_moe", "nllb_moe:tight"))
    block: Any = roomy.layers["decoder.1"]
    weight_TK, expert_TK = block.router.classifier(x_TD).softmax(dim=-1).topk(2, dim=-1)
    weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)
    parts_TKD = torch.stack(
        [
            torch.stack([block.experts[f"expert_{expert}"](x_D) for expert in row])
            for x_D, row in zip(x_TD, expert_TK.tolist(), strict=True)
        ]
    )
    expected_TD = 0.8 * (weight_TK[..., None] * parts_TKD).sum(dim=1)
    torch.testing.assert_close(block_output(roomy, "decoder.1", x_TD), expected_TD)
    assert torch.equal(block_routing(roomy, "decoder.1", x_TD)[0], expert_TK)
    assert (block_routing(tight, "decoder.1", x_TD)[0] == -1).any()
