"""`verify` against all families: it passes what is right and finds what is wrong."""

import asyncio
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.local_layer import LocalLayer
from cluster.patterns import parse_pattern
from cluster.reference import load_reference
from cluster.run_load import run_load
from cluster.run_model import run_verify
from cluster.verify import TOKEN_COUNTS, LayerError, relative_error, verify_layers
from experts.config import ExpertServerConfig
from experts.packed import WeightDtype
from experts.weights import bytes_per_copy
from protos.checkpoint import read_model
from protos.errors import InvalidRequest, UnsupportedModel
from tests.mesh import mesh
from tests.tiny_models import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
async def test_every_layer_through_a_router_is_the_model_s_own(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, tmp_path / family)
    seen: list[str] = []
    with mesh(model) as served:
        document = await run_verify(
            served.spec, router=served.router.address, on_layer=lambda error, tolerance: seen.append(error.layer)
        )
    assert document["ok"]
    assert document["tolerance"] == 1e-5
    assert document["largest_error"] <= 1e-5
    assert tuple(seen) == served.spec.layers


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
async def test_sixteen_bit_models_are_within_their_own_tolerance(dtype: str, tmp_path: Path) -> None:
    spec = read_model(tiny_model("deepseek_v3", tmp_path / dtype, dtype=dtype))
    document = await run_verify(spec, router=None, on_layer=lambda error, tolerance: None)
    assert document["ok"]
    assert 1e-5 < document["largest_error"] < document["tolerance"]


async def test_a_weight_that_differs_is_found_in_its_layer(tmp_path: Path) -> None:
    spec = read_model(tiny_model("mixtral", tmp_path / "served"))
    other = tiny_model("mixtral", tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    name = next(name for name in tensors if "layers.1." in name and "experts.3." in name)
    tensors[name] = tensors[name] * 1.001
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})

    async def compute(layer: str, x_TD: Tensor, token_ids_T: npt.NDArray[np.int64]) -> Tensor:
        return LocalLayer(spec, layer)(x_TD)[0]

    found: list[LayerError] = []
    errors = await verify_layers(spec, load_reference(read_model(other)), compute, on_layer=found.append)
    assert found == errors
    assert [error.layer for error in errors if error.error > 1e-5] == ["1"]
    assert errors[1].num_tokens in TOKEN_COUNTS


def test_an_answer_that_is_not_finite_is_infinitely_wrong() -> None:
    reference_TD = torch.ones(2, 3)
    y_TD = reference_TD.clone()
    y_TD[1, 2] = float("nan")
    assert relative_error(y_TD, reference_TD) == float("inf")


def test_a_router_with_another_model_is_refused(tmp_path: Path) -> None:
    spec = read_model(tiny_model("deepseek_v3", tmp_path / "mine"))
    with (
        mesh(tiny_model("mixtral", tmp_path / "theirs")) as served,
        pytest.raises(InvalidRequest, match="family is mixtral, not deepseek_v3"),
    ):
        asyncio.run(run_verify(spec, router=served.router.address, on_layer=lambda error, tolerance: None))


def test_a_dense_layer_has_no_block(tmp_path: Path) -> None:
    reference = load_reference(read_model(tiny_model("deepseek_v3", tmp_path / "model")))
    with pytest.raises(UnsupportedModel, match="layer 0"):
        reference.block("0")


@pytest.mark.parametrize("weight_dtype", ["int8", "int4", "fp8"])
async def test_servers_that_pack_their_experts_hold_more_and_verify_says_how_far_they_are(
    weight_dtype: WeightDtype, tmp_path: Path
) -> None:
    model = tiny_model("deepseek_v3", tmp_path)
    config = ExpertServerConfig(weight_dtype=weight_dtype)
    with mesh(model, experts=config) as served:
        document = await run_verify(served.spec, router=served.router.address, on_layer=lambda error, tolerance: None)
        loaded = await run_load(
            served.router.address,
            parse_pattern("zipf:1.1"),
            rate=None,
            concurrency=2,
            num_tokens=8,
            duration_s=0.5,
            timeout_s=10,
            model=model,
            check_share=1.0,
        )
        assert loaded["checks"]["wrong"] == 0
        report = served.servers["s0"].report()
        assert report.compute_dtype == "bfloat16"
        assert report.bytes == len(report.copies) * bytes_per_copy(served.spec, torch.bfloat16, weight_dtype)
        assert report.bytes < len(report.copies) * bytes_per_copy(served.spec, torch.bfloat16) * 0.9
    assert document["ok"]
    assert document["weight_dtype"] == weight_dtype
    assert 1e-3 < document["largest_rms_error"] < document["tolerance"]
    plain = await run_verify(served.spec, router=None, on_layer=lambda error, tolerance: None)
    assert plain["largest_rms_error"] <= 1e-5
