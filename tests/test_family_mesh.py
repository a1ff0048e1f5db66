"""Every family through a real router and two real expert servers on loopback gRPC: the block is the model's own."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.run_model import run_verify
from protos.errors import InvalidRequest
from router.client import RouterClient
from tests.family_models import FAMILIES, block_output, build_family
from tests.mesh import mesh

# Refused (tests/test_refusals.py), or with a second tower that is not served.
_NOT_SERVED = ("ernie4_5_vl_moe", "inkling", "muse_spark", "qwen3_omni_moe:talker")
SERVED = [name for name in FAMILIES if name not in _NOT_SERVED]


@pytest.mark.parametrize("name", SERVED)
async def test_a_family_s_block_through_router_and_servers_is_its_own(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    family = build_family(name, tmp_path)
    generator = torch.Generator().manual_seed(0)
    with mesh(tmp_path) as served:
        async with RouterClient(served.router.address) as client:
            for layer in served.spec.layers:
                for num_tokens in (1, 40):
                    x_TD = torch.randn(num_tokens, served.spec.dim, generator=generator)
                    ids_T = torch.randint(0, 64, (num_tokens,), generator=generator)
                    answer = await client.forward(layer, x_TD, token_ids_T=ids_T.numpy(), return_routing=True)
                    wanted_TD = block_output(family, layer, x_TD, ids_T)
                    assert float((answer.y_TD - wanted_TD).abs().max() / wanted_TD.abs().max()) <= 1e-5
                    assert answer.ledger.pairs == answer.ledger.computed
                    # What comes back as the routing can be sent as one, gaps and identity experts included.
                    again = await client.forward(layer, x_TD, routing=answer.routing)
                    torch.testing.assert_close(again.y_TD, answer.y_TD)
        document = await run_verify(served.spec, router=served.router.address, on_layer=lambda error, tolerance: None)
        assert document["ok"], document


async def test_token_ids_that_are_no_integers_are_refused(tmp_path: Path) -> None:
    build_family("deepseek_v4:hash", tmp_path)
    with mesh(tmp_path) as served:
        async with RouterClient(served.router.address) as client:
            x_TD = torch.randn(2, served.spec.dim)
            bad: Any
            for bad in (np.zeros(2), np.zeros((1, 2), dtype=np.int64)):
                with pytest.raises(InvalidRequest, match="token_ids has shape"):
                    await client.forward(served.spec.layers[0], x_TD, token_ids_T=bad)
            for few in (None, np.zeros(1, dtype=np.int64), np.array([0, 10**9])):
                with pytest.raises(InvalidRequest, match="token_ids"):
                    await client.forward(served.spec.layers[0], x_TD, token_ids_T=few)


async def test_projections_too_long_for_the_loop_are_computed_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.context.OFFLOAD_FLOPS", 1)
    monkeypatch.setattr("router.exchange.OFFLOAD_FLOPS", 1)
    torch.set_num_threads(1)
    family = build_family("nemotron_h:latent", tmp_path)
    with mesh(tmp_path) as served:
        async with RouterClient(served.router.address) as client:
            layer = served.spec.layers[0]
            states = [torch.randn(5 + i, served.spec.dim) for i in range(6)]
            answers = await asyncio.gather(*(client.forward(layer, x_TD) for x_TD in states))
    for x_TD, answer in zip(states, answers, strict=True):
        torch.testing.assert_close(answer.y_TD, block_output(family, layer, x_TD), rtol=1e-5, atol=1e-5)
