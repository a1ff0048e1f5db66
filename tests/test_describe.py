"""`describe`: what it says of a model is what the router and the servers then read, hold and compute."""

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cluster.cli import main
from cluster.describe import SERVER_COUNTS, describe_model, held_experts
from cluster.describe_view import describe_lines
from cluster.planner import PlannerInput, PlannerServer, plan
from cluster.words import layer_ranges
from experts.packed import PackedMatrix
from experts.weights import ExpertCopy, load_expert
from protos.checkpoint import Checkpoint, read_model
from protos.errors import CorruptWeights, InvalidRequest, UnsupportedModel
from tests.family_models import build_family
from tests.tiny_models import HIDDEN_DIM, NUM_EXPERTS, tiny_model

DEMO = Path(__file__).parent.parent / "examples" / "demo_model"

Build = Callable[..., Path]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The directory of a family's tiny model, built once."""
    folder = tmp_path_factory.mktemp("families")

    def directory(name: str, dtype: str = "float32") -> Path:
        path = folder / f"{name.replace(':', '-')}-{dtype}"
        if not path.exists():
            build_family(name, path, dtype=dtype)
        return path

    return directory


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (
            "mixtral",
            {
                "gate": "Logits are computed in the model's dtype and become scores by softmax in fp32; the 2 best of "
                "8 experts are chosen. Weights are the scores of the chosen divided by their sum, kept in fp32, and "
                "multiply the expert's output.",
                "expert": "SwiGLU",
                "shared": None,
                "around": None,
            },
        ),
        (
            "deepseek_v3",
            {
                "gate": "Logits are computed in fp32 and become scores by sigmoid in fp32; the 4 best of 16 experts by "
                "score plus a learned bias (not in the weights) from the 2 best of 4 groups (a group counts as the sum "
                "of its two best) are chosen. Weights are the scores of the chosen divided by their sum + 1e-20, times "
                "1.5, kept in fp32, and multiply the expert's output.",
                "shared": "SwiGLU, 48 wide; added",
                "layer_ranges": "1-2",
            },
        ),
        ("llama4", {"gate": ("the best one of 8 experts is chosen", "multiply the expert's input."), "top_k": 1}),
        ("phimoe", {"gate": ("one after another", "(sparsemixer). Weights are each the softmax over")}),
        ("laguna", {"gate": ("soft-capped at 2 by tanh",), "around": "the routed sum is multiplied by 1.5"}),
        (
            "gpt_oss",
            {"expert": "gate * sigmoid(1.702 * gate) * (up + 1), gate at most 0.5 and up within ±0.5, with biases"},
        ),
        ("qwen2_moe", {"shared": "SwiGLU, 40 wide, times the sigmoid of a learned projection of the token; added"}),
        ("cohere2_moe:average", {"shared": ("the block returns the mean of it and the routed sum",)}),
        ("nemotron_h:latent", {"expert": "squared ReLU without a gate", "around": ("projected to 24", "back after")}),
        ("longcat_flash", {"identity_experts": 4, "gate": ("8 experts and 4 identity experts (which return",)}),
        ("gemma4", {"gate": ("RMS-normalised", "learned factor of the expert"), "expert": "GeGLU (tanh GELU)"}),
        ("dbrx:l2", {"gate": ("divided by their 2-norm",)}),
        ("ernie4_5_moe", {"gate": ("router that is kept in fp32", "their sum, which counts as at least 0.7")}),
        ("switch_transformers", {"gate": ("every expert takes at most 3 of the T tokens of a request",)}),
        ("nllb_moe", {"layers": ["decoder.1", "encoder.1"], "transformer_layers": 4, "gate": ("second choices",)}),
    ],
)
def test_a_block_is_said_in_words(name: str, parts: dict[str, Any], build: Build) -> None:
    found = describe_model(build(name))
    for key, expected in parts.items():
        if isinstance(expected, tuple):
            assert all(part in found[key] for part in expected), found[key]
        else:
            assert found[key] == expected


def test_layers_that_differ_are_named(build: Build) -> None:
    hashed = describe_model(build("deepseek_v4:hash"))
    assert hashed["needs_token_ids"]
    assert hashed["layer_ranges"] == "0-2"
    assert "2 of 8 experts are looked up by token id" in hashed["gate"]
    (other,) = hashed["differing_layers"]
    assert (other["layers"], other["ranges"]) == (["2"], "2")
    assert other["words"] == ["the 2 best of 8 experts by score plus a learned bias (not in the weights) are chosen"]
    per_layer = describe_model(build("hunyuan_v1_moe:per_layer"))["differing_layers"]
    assert [other["words"] for other in per_layer] == [
        ["the 3 best of 8 experts are chosen"],
        ["the 4 best of 8 experts are chosen"],
    ]
    assert describe_model(build("mixtral"))["differing_layers"] == []


@pytest.mark.parametrize(
    "name", ["mixtral", "deepseek_v4:hash", "nemotron_h:latent", "gpt_oss", "qwen2_moe", "gemma4", "jetmoe"]
)
def test_stored_bytes_are_those_that_servers_and_routers_read(name: str, build: Build) -> None:
    path = build(name, "bfloat16")
    stored, checkpoint = describe_model(path)["stored"], Checkpoint(read_model(path))
    experts = router = 0
    for entry in stored["layers"]:
        layer, before = entry["layer"], checkpoint.bytes_read
        for expert in range(checkpoint.spec.num_experts):
            checkpoint.expert(layer, expert)
        assert entry["experts_bytes"] == checkpoint.bytes_read - before
        experts += entry["experts_bytes"]
        before = checkpoint.bytes_read
        checkpoint.gate(layer), checkpoint.shared(layer), checkpoint.around(layer)
        assert entry["router_bytes"] == checkpoint.bytes_read - before
        router += entry["router_bytes"]
    assert (stored["bytes"], stored["router_bytes"]) == (experts, router)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h:latent"])
def test_bytes_in_memory_are_those_of_a_loaded_expert(name: str, build: Build) -> None:
    path = build(name)
    memory, spec = describe_model(path)["memory"], read_model(path)
    checkpoint = Checkpoint(spec)
    assert len(memory) == 8
    for row in memory:
        copy = load_expert(
            checkpoint,
            spec.layers[0],
            0,
            device=torch.device("cpu"),
            dtype=getattr(torch, row["compute_dtype"]),
            weight_dtype=None if row["weight_dtype"] == "compute" else row["weight_dtype"],
        )
        assert isinstance(copy.up, PackedMatrix) == (row["weight_dtype"] != "compute")
        assert row["expert_bytes"] == _copy_bytes(copy)
        assert row["layer_bytes"] == _copy_bytes(copy) * spec.num_experts
        assert row["bytes"] == _copy_bytes(copy) * spec.num_experts * len(spec.layers)


def _copy_bytes(copy: ExpertCopy) -> int:
    return sum(part.nbytes for part in (copy.up, copy.down, copy.up_bias, copy.down_bias) if part is not None)


def test_quantised_experts_are_named_with_the_layers_they_are_in(tmp_path: Path) -> None:
    path = tiny_model("qwen3_moe", tmp_path / "fp8")
    tensors = load_file(path / "model.safetensors")
    for name, weight in list(tensors.items()):
        if ".experts." in name and ".layers.2." not in name:
            tensors[name] = weight.to(torch.float8_e4m3fn)
            grid = [-(-size // 32) for size in weight.shape]
            tensors[f"{name}_scale_inv"] = torch.ones(grid)
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_bytes())
    options = {"quant_method": "fp8", "weight_block_size": [32, 32], "modules_to_not_convert": ["model.layers.2"]}
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": options}))
    found = describe_model(path)
    assert found["stored_as"] == "layers 0-1: FP8, one scale for 32 x 32 weights; layers 2: plain F32"
    values, scales = 3 * 64 * HIDDEN_DIM, 3 * 2  # matrices of [64, 32]: two blocks each
    assert found["stored"]["expert_bytes"] == {"smallest": values + 4 * scales, "largest": 4 * values}
    assert found["stored"]["bytes"] == NUM_EXPERTS * (2 * (values + 4 * scales) + 4 * values)


def test_no_weight_is_read(tmp_path: Path) -> None:
    path = tiny_model("mixtral", tmp_path / "model")
    before = describe_model(path)
    file = path / "model.safetensors"
    tensors = {name: torch.full_like(tensor, float("nan")) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})  # whoever reads one of them reports it
    assert describe_model(path) == before


# ---------------------------------------------------------------- clusters


def test_clusters_of_the_usual_sizes_hold_every_expert_once() -> None:
    cluster = describe_model(DEMO)["cluster"]
    assert [size["servers"] for size in cluster["sizes"]] == list(SERVER_COUNTS)
    for size in cluster["sizes"]:
        assert size["experts_per_server"] == {"smallest": 64 // size["servers"], "largest": 64 // size["servers"]}
        assert size["bytes_per_server"] == 64 // size["servers"] * cluster["expert_bytes"]
        assert (size["missing_experts"], size["spare_copies"]) == (0, None)
    assert (cluster["experts"], cluster["bytes"]) == (64, 64 * cluster["expert_bytes"])


@settings(max_examples=30)
@given(fits=st.integers(1, 100))
def test_the_servers_needed_are_just_enough(fits: int) -> None:
    copy = 3 * 128 * 128 * 4
    budget = fits * copy + copy - 1  # what remains fits no expert
    needed = describe_model(DEMO, servers=(), budget_bytes=budget)["cluster"]["servers_needed"]
    cluster = describe_model(DEMO, servers=(needed, max(needed - 1, 1)), budget_bytes=budget)["cluster"]
    assert cluster["copies_per_server"] == fits
    enough, fewer = cluster["sizes"]
    assert enough["missing_experts"] == 0
    assert enough["spare_copies"] == needed * fits - 64
    assert enough["experts_per_server"]["largest"] <= fits
    if needed > 1:
        assert fewer["missing_experts"] == 64 - (needed - 1) * fits > 0
        assert fewer["spare_copies"] == 0


@given(num_servers=st.integers(1, 9), max_copies=st.integers(0, 70))
def test_experts_are_counted_as_the_planner_places_them(num_servers: int, max_copies: int) -> None:
    spec = read_model(DEMO)
    servers = tuple(PlannerServer(server_id=f"s{s}", max_copies=max_copies) for s in range(num_servers))
    found = plan(PlannerInput(layers=spec.layers, load_LE=np.zeros((4, 16)), servers=servers, current={}))
    holders = [copy.server_id for copies in found.copies.values() for copy in copies]
    held = held_experts(spec, num_servers, max_copies)
    assert held == [holders.count(server.server_id) for server in servers]
    assert 64 - sum(held) == len(found.missing)


def test_packed_weights_and_the_compute_dtype_decide_what_fits() -> None:
    for weight_dtype, compute_dtype in product(("compute", "int4"), ("float32", "bfloat16")):
        found = describe_model(
            DEMO,
            budget_bytes=1 << 20,
            weight_dtype=weight_dtype,  # type: ignore[arg-type]
            compute_dtype=compute_dtype,  # type: ignore[arg-type]
        )
        (row,) = [
            row
            for row in found["memory"]
            if (row["weight_dtype"], row["compute_dtype"]) == (weight_dtype, compute_dtype)
        ]
        assert found["cluster"]["expert_bytes"] == row["expert_bytes"]
        assert found["cluster"]["copies_per_server"] == (1 << 20) // row["expert_bytes"]


def test_a_16_bit_model_is_planned_in_bfloat16(build: Build) -> None:
    assert describe_model(build("mixtral", "bfloat16"))["cluster"]["compute_dtype"] == "bfloat16"
    assert describe_model(build("mixtral"))["cluster"]["compute_dtype"] == "float32"


def test_a_budget_below_one_expert_holds_none() -> None:
    found = describe_model(DEMO, servers=(2,), budget_bytes=1000)
    assert (found["cluster"]["copies_per_server"], found["cluster"]["servers_needed"]) == (0, None)
    assert found["cluster"]["sizes"][0]["missing_experts"] == 64
    assert any("not a single expert fits" in line for line in describe_lines(found))


@pytest.mark.parametrize(("servers", "budget"), [(0, None), (5000, None), (-1, None), (2, 0), (2, -5)])
def test_numbers_that_cannot_be_are_refused(servers: int, budget: int | None) -> None:
    with pytest.raises(InvalidRequest, match=str(servers if budget is None else budget)):
        describe_model(DEMO, servers=(servers,), budget_bytes=budget)


# ---------------------------------------------------------------- words


@given(st.sets(st.integers(0, 60), min_size=1), st.sets(st.integers(0, 60)))
def test_ranges_name_every_layer_once(plain: set[int], encoder: set[int]) -> None:
    layers = [str(layer) for layer in sorted(plain)] + [f"encoder.{layer}" for layer in sorted(encoder)]
    named: list[str] = []
    for part in layer_ranges(layers).split(", "):
        where, _, step = part.partition(" in steps of ")
        side, dot, numbers = where.rpartition(".")
        first, _, last = numbers.partition("-")
        named += [f"{side}{dot}{layer}" for layer in range(int(first), int(last or first) + 1, int(step or 1))]
    assert named == layers


@pytest.mark.parametrize(
    ("layers", "ranges"),
    [
        ("0 1 2 3", "0-3"),
        ("7", "7"),
        ("1 3", "1, 3"),
        ("1 3 5 7", "1-7 in steps of 2"),
        ("0 1 2 9 12 15 20", "0-2, 9-15 in steps of 3, 20"),
        ("encoder.1 encoder.2 decoder.5", "encoder.1-2, decoder.5"),
    ],
)
def test_ranges_are_short(layers: str, ranges: str) -> None:
    assert layer_ranges(layers.split()) == ranges


def test_people_read_every_fact(build: Build) -> None:
    text = "\n".join(describe_lines(describe_model(build("deepseek_v4:hash"), budget_bytes=100_000)))
    for part in (
        "family  deepseek_v4, float32; experts stored as plain F32",
        "layers  3 MoE layers of 3: 0-2",
        "experts 8 per layer, top 2; D 64, F 48, shared 48; 9,216 parameters each",
        "layers 2: the 2 best of 8 experts by score",
        "need token ids",
        "stored  an expert 36.0 KiB, a layer's experts 288.0 KiB, all 864.0 KiB; every router reads",
        "97.7 KiB for each server hold 2 copies; 12 servers hold one copy of every expert",
    ):
        assert part in text


# ---------------------------------------------------------------- the command


@pytest.fixture
def describe(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """`expertmesh describe` in this process: status, standard output, standard error."""

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["expertmesh", "describe", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capfd.readouterr()

    return run


def test_the_command_prints_one_document_without_ray_and_transformers() -> None:
    script = (
        "import atexit, sys; from cluster.cli import main; sys.argv[0] = 'expertmesh'; "
        "atexit.register(lambda: print(sorted({'ray', 'transformers'} & sys.modules.keys()), file=sys.stderr)); main()"
    )
    args = ["describe", str(DEMO), "--servers", "3", "--json"]
    done = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert json.loads(done.stdout) == json.loads(json.dumps(describe_model(DEMO, servers=(3,))))
    assert done.stderr == "[]\n"


def test_the_command_prints_lines_for_people(describe: Callable[..., tuple[int, str, str]]) -> None:
    status, stdout, stderr = describe(DEMO, "--weight-dtype", "int8", "--compute-dtype", "bfloat16")
    assert (status, stderr) == (0, "")
    assert "a cluster with int8 weights, computing in bfloat16: 64 experts" in stdout


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (("no/such/dir",), "no such directory"),
        (("pyproject.toml",), "is a file"),
        (("tests",), "config.json"),
        ((DEMO, "--servers", "0"), "--servers is 0, it must be 1..4096"),
        ((DEMO, "--servers", "many"), "--servers"),
        ((DEMO, "--budget-bytes", "0"), "--budget-bytes is 0"),
        ((DEMO, "--weight-dtype", "int3"), "'int3' is not one of"),
        ((DEMO, "--compute-dtype", "float16"), "'float16' is not one of"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    args: tuple[object, ...], part: str, describe: Callable[..., tuple[int, str, str]]
) -> None:
    status, stdout, stderr = describe(*args, "--json")
    assert (status, stdout, stderr.count("\n")) == (2, "", 1)
    assert stderr.startswith("expertmesh: ")
    assert part in stderr


@pytest.mark.parametrize("family", ["zaya", "doge", "ernie4_5_vl_moe", "inkling_mm_model", "muse_spark"])
def test_a_family_that_is_not_served_is_refused_by_name(
    family: str, tmp_path: Path, describe: Callable[..., tuple[int, str, str]]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "hidden_size": 64}))
    with pytest.raises(UnsupportedModel):
        describe_model(tmp_path)
    status, stdout, stderr = describe(tmp_path)
    assert (status, stdout, stderr.count("\n")) == (2, "", 1)
    assert f"config.json: model_type is '{family}' (supported: " in stderr


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    file = tiny_model("mixtral", tmp_path / "model") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorruptWeights, match="truncated"):
        describe_model(file.parent)
