"""Gate and shared expert: equal to the blocks of transformers, the gate to the last bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DeepseekV3Config, MixtralConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from protos.checkpoint import Checkpoint, ExpertWeights, GateWeights, SharedWeights, read_model
from protos.model import GateSpec, GroupLimit, SharedSpec
from router.gate import Gate
from router.shared import SharedExpert
from tests.strategies import Routed, routed
from tests.tiny_models import FAMILIES, load_reference, reference_block, tiny_model

DTYPES = ("float32", "bfloat16")
NUM_TOKENS = (1, 7, 300)


@pytest.fixture(scope="module", params=[(family, dtype) for family in FAMILIES for dtype in DTYPES])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, dtype = request.param
    return tiny_model(family, tmp_path_factory.mktemp(f"{family}-{dtype}"), dtype=dtype)


def hidden_states(num_tokens: int, dim: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_every_family_routes_exactly_as_transformers(model: Path) -> None:
    spec, reference = read_model(model), load_reference(model)
    checkpoint = Checkpoint(spec)
    for layer in spec.layers:
        gate = Gate(spec.blocks[layer].gate, checkpoint.gate(layer))
        for num_tokens in NUM_TOKENS:
            x_TD = hidden_states(num_tokens, spec.dim, getattr(torch, spec.dtype), seed=num_tokens)
            with torch.no_grad():
                block: Any = reference_block(reference, layer)
                _, weight_TK, expert_TK = block.gate(x_TD)
            routing = gate(x_TD)
            np.testing.assert_array_equal(routing.expert_TK, expert_TK.numpy())
            np.testing.assert_array_equal(routing.weight_TK, weight_TK.float().numpy())
            assert routing.expert_TK.dtype == np.int32
            assert routing.weight_TK.dtype == np.float32
            assert routing.score_TE is None


def test_shared_expert_equals_that_of_transformers(model: Path) -> None:
    spec, reference = read_model(model), load_reference(model)
    for layer, block_spec in spec.blocks.items():
        shared = block_spec.shared
        if shared is None:
            assert spec.family in ("mixtral", "qwen3_moe", "olmoe")
            continue
        weights = Checkpoint(spec).shared(layer)
        assert weights is not None
        x_TD = hidden_states(9, spec.dim, getattr(torch, spec.dtype))
        with torch.no_grad():
            block: Any = reference_block(reference, layer)
            if shared.gated:
                wanted_TD = torch.sigmoid(block.shared_expert_gate(x_TD)) * block.shared_expert(x_TD)
            else:
                wanted_TD = block.shared_experts(x_TD)
        torch.testing.assert_close(SharedExpert(shared, weights)(x_TD), wanted_TD)


def test_ties_go_to_the_same_experts_as_in_transformers() -> None:
    """Inputs of few distinct values make ties between experts in almost every token."""
    softmax = GateSpec(num_experts=32, top_k=4, score="softmax", renorm="sum")
    grouped = GateSpec(
        num_experts=32,
        top_k=4,
        score="sigmoid",
        logits_dtype="float32",
        selection_bias=True,
        groups=GroupLimit(num_groups=4, top_groups=2),
        renorm="sum",
        renorm_eps=1e-20,
        scale=2.5,
    )
    mixtral: Any = MixtralTopKRouter(  # type: ignore[no-untyped-call]
        MixtralConfig(hidden_size=4, num_local_experts=32, num_experts_per_tok=4)
    )
    deepseek: Any = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=4,
            n_routed_experts=32,
            num_experts_per_tok=4,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.5,
        )
    )
    generator = torch.Generator().manual_seed(1)
    weight_ED = torch.randint(-1, 2, (32, 4), generator=generator).float()
    x_TD = torch.randint(-1, 2, (64, 4), generator=generator).float()
    bias_E = torch.randint(-1, 2, (32,), generator=generator) / 8
    for spec, router in ((softmax, mixtral), (grouped, deepseek)):
        router.load_state_dict(
            {"weight": weight_ED, "e_score_correction_bias": bias_E} if spec.selection_bias else {"weight": weight_ED}
        )
        with torch.no_grad():
            _, weight_TK, expert_TK = router(x_TD)
        routing = Gate(spec, GateWeights(weight_ED=weight_ED, bias_E=bias_E if spec.selection_bias else None))(x_TD)
        np.testing.assert_array_equal(routing.expert_TK, expert_TK.numpy())
        np.testing.assert_array_equal(routing.weight_TK, weight_TK.numpy())


def test_inputs_of_another_dtype_are_cast_to_the_models() -> None:
    spec = GateSpec(num_experts=8, top_k=2, score="softmax", renorm="sum", weight_dtype="model")
    gate = Gate(spec, GateWeights(weight_ED=hidden_states(8, 16, torch.bfloat16), bias_E=None))
    x_TD = hidden_states(5, 16, torch.float32, seed=1)
    np.testing.assert_array_equal(gate(x_TD).weight_TK, gate(x_TD.bfloat16()).weight_TK)


@given(routed())
def test_selection_takes_the_highest_choice_scores_and_never_an_expert_twice(batch: Routed) -> None:
    routing = batch.routing
    assert routing.choice_TE is not None
    chosen_TK = np.take_along_axis(routing.choice_TE, routing.expert_TK, axis=1)
    others_TE = routing.choice_TE.copy()
    np.put_along_axis(others_TE, routing.expert_TK, -np.inf, axis=1)
    assert (np.sort(routing.expert_TK, axis=1)[:, 1:] != np.sort(routing.expert_TK, axis=1)[:, :-1]).all()
    assert (chosen_TK.min(axis=1) >= others_TE.max(axis=1)).all()


@given(routed())
def test_weighing_the_gates_own_choice_gives_its_own_weights(batch: Routed) -> None:
    routing = batch.routing
    assert routing.score_TE is not None
    np.testing.assert_array_equal(batch.gate.weigh(routing.score_TE, routing.expert_TK), routing.weight_TK)


@given(routed(), st.data())
def test_weighing_a_smaller_set_renormalises_over_it_and_gives_missing_experts_nothing(
    batch: Routed, data: st.DataObject
) -> None:
    score_TE = batch.routing.score_TE
    assert score_TE is not None
    shape = batch.routing.expert_TK.shape
    missing = data.draw(st.lists(st.booleans(), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    expert_TK = np.where(np.array(missing).reshape(shape), np.int32(-1), batch.routing.expert_TK)
    weight_TK = batch.gate.weigh(score_TE, expert_TK)
    assert (weight_TK[expert_TK < 0] == 0).all()
    full_TK = batch.gate.weigh(score_TE, batch.routing.expert_TK)
    for t in range(shape[0]):
        held = expert_TK[t] >= 0
        if held.any():  # scores keep their proportions, whatever the normalisation
            np.testing.assert_allclose(
                weight_TK[t, held] / weight_TK[t, held].sum(), full_TK[t, held] / full_TK[t, held].sum(), rtol=1e-5
            )


def test_scores_are_what_weights_are_made_of_and_choices_are_masked() -> None:
    spec = GateSpec(
        num_experts=8,
        top_k=2,
        score="sigmoid",
        selection_bias=True,
        groups=GroupLimit(num_groups=4, top_groups=1),
    )
    bias_E = torch.tensor([0.0, 0, 0, 0, 0, 0, 9, 9])
    gate = Gate(spec, GateWeights(weight_ED=hidden_states(8, 16, torch.float32), bias_E=bias_E))
    routing = gate(hidden_states(6, 16, torch.float32, seed=2), with_scores=True)
    assert routing.score_TE is not None
    assert routing.choice_TE is not None
    assert (np.sort(routing.expert_TK, axis=1) == [6, 7]).all()
    np.testing.assert_array_equal(routing.weight_TK, np.take_along_axis(routing.score_TE, routing.expert_TK, axis=1))
    assert (routing.score_TE < 1).all()
    assert (routing.choice_TE[:, :6] == -np.inf).all()


def test_a_shared_expert_without_output_gate_is_a_plain_swiglu() -> None:
    gate_FD, up_FD, down_DF = (
        hidden_states(*shape, torch.float32, i) for i, shape in enumerate([(12, 8), (12, 8), (8, 12)])
    )
    mlp = ExpertWeights(up_IL=torch.cat((gate_FD, up_FD)), down_LF=down_DF)
    x_TD = hidden_states(3, 8, torch.float32, 4)
    gate_TF, up_TF = x_TD @ gate_FD.T, x_TD @ up_FD.T
    wanted_TD = (gate_TF * torch.sigmoid(gate_TF) * up_TF) @ down_DF.T
    shared = SharedExpert(SharedSpec(hidden_dim=12), SharedWeights(mlp=mlp, output_gate_1D=None))
    torch.testing.assert_close(shared(x_TD), wanted_TD)
