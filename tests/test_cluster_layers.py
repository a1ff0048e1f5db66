"""`expertmesh layer --router` on a running cluster: a family for each thing that its replicas must not lose.

Gates and expert forms of every family: tests/test_family_mesh.py, the same router and servers without Ray.
"""

import asyncio
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.cli import app
from protos.checkpoint import read_model
from tests.cluster_fixtures import deployed
from tests.family_models import FamilyModel, block_output, block_routing, build_family

CASES = {
    "deepseek_v4:hash": "experts by token id",
    "gpt_oss": "biases everywhere, interleaved rows",
    "llama4": "weights on the input, transposed stacks",
    "cohere2_moe:average": "average with the shared expert",
    "nemotron_h:latent": "latent projections: experts of another width than the model",
    "longcat_flash": "identity experts, which no server holds",
    "switch_transformers": "a capacity for every sequence, encoder and decoder",
}
TOKENS = 19


@pytest.mark.parametrize("name", CASES)
def test_a_layer_through_the_cluster_is_the_model_s_own(
    name: str, ray_cluster: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    family = build_family(name, tmp_path / "model")
    slug = name.replace(":", "-").replace("_", "-")
    with deployed(
        family.path,
        name=f"layers-{slug}",
        router={"http_port": 8265, "route_prefix": f"/layers-{slug}", "settings": {"compute_threads": 1}},
        experts={"min_servers": 1, "max_servers": 1, "num_cpus": 0.1, "settings": {"compute_threads": 1}},
    ) as cluster:
        status, _ = asyncio.run(
            cluster.until(lambda status: not status["missing_experts"], "every expert has a live copy")
        )
        assert set(family.layers) == set(cluster.spec.layers)
        for layer in cluster.spec.layers:
            check_layer(family, layer, status["router"]["grpc"], tmp_path, capfd)


def check_layer(family: FamilyModel, layer: str, router: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The command's files against transformers' block: output, experts as sets, weights."""
    spec = read_model(family.path)
    generator = torch.Generator().manual_seed(len(layer))
    x_TD = torch.randn(TOKENS, spec.dim, generator=generator)
    ids_T = torch.randint(0, 64, (TOKENS,), generator=generator)
    save_file({"hidden_states": x_TD, "token_ids": ids_T}, folder / "in.safetensors")
    arguments = ["layer", str(family.path), "--layer", layer, "--router", router, "--json"]
    arguments += ["--input", str(folder / "in.safetensors"), "--output", str(folder / "out.safetensors")]
    app(arguments, standalone_mode=False)  # raises what the command would report
    assert json.loads(capfd.readouterr().out)["ledger"]["dropped"] == 0
    found = load_file(folder / "out.safetensors")
    wanted_TD = block_output(family, layer, x_TD, ids_T)
    assert float((found["output"] - wanted_TD).abs().max() / wanted_TD.abs().max()) <= 1e-5
    expert_TK, weight_TK = block_routing(family, layer, x_TD, ids_T)
    ours_TK, order_TK = found["expert_ids"].sort(dim=1)
    theirs_TK, their_order_TK = expert_TK.sort(dim=1)
    assert torch.equal(ours_TK, theirs_TK)
    difference_TK = found["gate_weights"].gather(1, order_TK) - weight_TK.float().gather(1, their_order_TK)
    assert float(difference_TK.abs().max()) <= 1e-6
