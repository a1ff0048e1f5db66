"""The command line as scripts use it: in subprocesses, standard output, one line on standard error, exit status."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.cli import main
from cluster.local_layer import LocalLayer
from cluster.standing import load
from protos.checkpoint import read_model
from router.client import as_tensors
from router.config import RouterConfig
from tests.mesh import Mesh, mesh
from tests.tiny_models import DIM, TOP_K, tiny_model

Completed = subprocess.CompletedProcess[str]
Run = Callable[..., Completed]


def expertmesh(*args: object) -> Completed:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", *map(str, args)], capture_output=True, text=True, timeout=240
    )


@pytest.fixture
def here(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command's `main` in this process, which spares the seconds that torch takes to import."""

    def run(*args: object) -> Completed:
        monkeypatch.setattr(sys, "argv", ["expertmesh", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main()
        stdout, stderr = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return Completed([*map(str, args)], ended.value.code, stdout, stderr)

    return run


def document(done: Completed) -> Any:
    """Standard output, which has to be exactly one JSON document on one line."""
    assert done.stdout.count("\n") == 1, done.stdout
    return json.loads(done.stdout)


def assert_one_line(done: Completed, status: int, *parts: str) -> None:
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("expertmesh: ")
    for part in parts:
        assert part in done.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen2_moe", tmp_path_factory.mktemp("models") / "qwen2_moe")


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Mesh]:
    with mesh(model, router=RouterConfig(max_request_tokens=100)) as served:
        yield served


@pytest.fixture
def states(tmp_path: Path) -> Path:
    path = tmp_path / "in.safetensors"
    save_file({"hidden_states": torch.randn(257, DIM, generator=torch.Generator().manual_seed(3))}, path)
    return path


def test_help_is_there_at_once() -> None:
    began_s = time.monotonic()
    done = expertmesh("--help")
    assert time.monotonic() - began_s < 2.0  # torch alone takes longer to import
    assert done.returncode == 0
    for command in ("layer", "verify", "load", "plan", "up", "status", "down"):
        assert f"  {command} " in done.stdout


def test_layer_writes_the_block_s_output_and_its_routing(model: Path, states: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    done = expertmesh("layer", model, "--layer", 1, "--input", states, "--output", output, "--json")
    assert done.returncode == 0, done.stderr
    result = document(done)
    assert (result["tokens"], result["layer"], result["router"]) == (257, "1", None)
    expected_TD, routing = LocalLayer(read_model(model), "1")(load_file(states)["hidden_states"])
    expert_TK, weight_TK = as_tensors(routing)
    arrays = load_file(output)
    assert set(arrays) == {"output", "expert_ids", "gate_weights"}
    torch.testing.assert_close(arrays["output"], expected_TD, rtol=1e-5, atol=1e-6)  # threads change the last bits
    assert torch.equal(arrays["expert_ids"], expert_TK)
    torch.testing.assert_close(arrays["gate_weights"], weight_TK, rtol=1e-6, atol=1e-7)


def test_layer_through_a_router_splits_what_is_above_its_limit(
    served: Mesh, states: Path, tmp_path: Path, here: Run
) -> None:
    model, address = served.spec.path, served.router.address
    args = ("layer", model, "--layer", 2, "--input", states)
    before = served.router.report().totals.requests
    done = here(*args, "--output", tmp_path / "routed", "--router", address, "--json")
    assert done.returncode == 0, done.stderr
    assert document(done)["ledger"]["pairs"] == 257 * TOP_K
    assert served.router.report().totals.requests - before == 3  # 100 + 100 + 57
    assert here(*args, "--output", tmp_path / "local").returncode == 0
    routed, local = load_file(tmp_path / "routed"), load_file(tmp_path / "local")
    assert torch.equal(routed["expert_ids"], local["expert_ids"])
    torch.testing.assert_close(routed["gate_weights"], local["gate_weights"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(routed["output"], local["output"], rtol=1e-5, atol=1e-5)


def test_verify_says_per_layer_how_far_off_it_is(model: Path) -> None:
    done = expertmesh("verify", model, "--json")
    assert done.returncode == 0, done.stderr
    result = document(done)
    assert [entry["layer"] for entry in result["layers"]] == ["0", "1", "2"]
    assert result["ok"]
    assert result["largest_error"] <= result["tolerance"] == 1e-5


def test_verify_beyond_tolerance_has_status_1(served: Mesh, tmp_path: Path, here: Run) -> None:
    other = tiny_model("qwen2_moe", tmp_path / "other", seed=1)
    done = here("verify", other, "--router", served.router.address, "--json")
    assert done.returncode == 1
    assert not document(done)["ok"]
    assert "exceeds 1e-05" in done.stderr


def test_load_reports_one_document(served: Mesh) -> None:
    done = expertmesh("load", "--router", served.router.address, "--duration", 1, "--pattern", "zipf:1", "--json")
    assert done.returncode == 0, done.stderr
    result = document(done)
    assert result["requests"]["failed"] == 0
    assert result["checks"]["checked"] > 0
    assert result["checks"]["wrong"] == 0
    assert result["latency_s"]["p50"] <= result["latency_s"]["p99"]
    assert result["ledger"]["pairs"] == result["tokens"] * TOP_K


def test_load_for_people_is_lines(served: Mesh, here: Run) -> None:
    done = here("load", "--router", served.router.address, "--duration", 0.5, "--rate", "0:10,0.5:30", "--tokens", 4)
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout
    assert "wrong 0" in done.stdout


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (("nosuch",), ("nosuch",)),
        (("layer", "m"), ("--layer",)),
        (("load",), ("--router",)),
        (("load", "--router", "x"), ("'x'", "host:port")),
        (("load", "--router", "h:70000"), ("'h:70000'", "65535")),
        (("load", "--router", "h:1", "--tokens", "0"), ("--tokens", "0")),
        (("load", "--router", "h:1", "--tokens", "many"), ("--tokens", "integer")),
        (("load", "--router", "h:1", "--rate", "-1"), ("--rate", "-1")),
        (("load", "--router", "h:1", "--rate", "0:1,x"), ("--rate", "0:1,x")),
        (("load", "--router", "h:1", "--move-every", "0"), ("--move-every", "0")),
        (("load", "--router", "h:1", "--check", "2"), ("--check", "2")),
        (("load", "--router", "h:1", "--rate", "1", "--concurrency", "1"), ("--rate", "--concurrency")),
        (("load", "--router", "h:1", "--pattern", "even"), ("'even'", "zipf:A")),
        (("verify", "no/such/dir"), ("'no/such/dir'", "no such directory")),
        (("verify", "pyproject.toml"), ("'pyproject.toml'", "is a file")),
        (("verify", "tests"), ("config.json",)),
    ],
)
def test_a_bad_argument_is_one_line_and_status_2(args: tuple[str, ...], parts: tuple[str, ...], here: Run) -> None:
    assert_one_line(here(*args), 2, *parts)


@pytest.mark.parametrize(
    ("text", "args", "parts"),
    [
        (None, (), ("CONFIG.yaml", "--model")),
        (None, ("--model", "no/such/dir"), ("'no/such/dir'", "no such directory")),
        (None, ("--model", "tests"), ("config.json",)),
        (None, ("--model", "{model}", "--servers", "0"), ("--servers is 0", "at least 1")),
        (None, ("no.yaml",), ("no.yaml", "No such file")),
        ("model: [", ("{config}",), ("not YAML",)),
        ("model: x\nexpert: {}", ("{config}",), ("expert",)),
        ("experts: {min_servers: 3, max_servers: 1}", ("{config}", "--model", "{model}"), ("max_servers (1)",)),
        (None, ("--model", "{model}", "--address", "nowhere"), ("'nowhere'", "host:port")),
    ],
)
def test_a_cluster_that_cannot_be_is_one_line_and_status_2(
    text: str | None, args: tuple[str, ...], parts: tuple[str, ...], model: Path, tmp_path: Path, here: Run
) -> None:
    config = tmp_path / "config.yaml"
    if text is not None:
        config.write_text(text)
    given = [arg.format(model=model, config=config) for arg in args]
    assert_one_line(here("up", *given, "--state-dir", tmp_path / "state"), 2, *parts)
    assert not (tmp_path / "state" / "cluster.json").exists()


def test_a_port_in_use_is_one_line_and_status_2(model: Path, tmp_path: Path, here: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = tmp_path / "config.yaml"
        config.write_text(f"model: {model}\nrouter: {{port: {port}}}")
        assert_one_line(here("up", config, "--state-dir", tmp_path), 2, f"port {port}", "in use")


def test_a_ray_that_is_not_there_is_one_line_and_status_1(model: Path, tmp_path: Path, here: Run) -> None:
    done = here("up", "--model", model, "--address", "127.0.0.1:1", "--state-dir", tmp_path)
    assert_one_line(done, 1, "no Ray at 127.0.0.1:1")


def test_nothing_is_up_unless_somebody_started_it(tmp_path: Path, here: Run) -> None:
    assert_one_line(here("status", "--json", "--state-dir", tmp_path), 1, "no cluster is up")
    done = here("down", "--state-dir", tmp_path)
    assert (done.returncode, done.stdout) == (0, "no cluster is up\n")


def test_a_cluster_goes_up_shows_its_status_and_goes_down(model: Path, tmp_path: Path, here: Run) -> None:
    state = ("--state-dir", tmp_path / "state")
    config = tmp_path / "config.yaml"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        http_port = probe.getsockname()[1]
    config.write_text(f"name: tried\nrouter: {{http_port: {http_port}}}\n")
    done = expertmesh("up", config, "--model", model, "--servers", 1, "--detach", "--json", *state)
    try:
        assert done.returncode == 0, done.stderr
        found = document(done)
        assert found["model"] == str(model)
        assert found["missing_experts"] == []
        assert [server["state"] for server in found["servers"]] == ["serving"]
        assert_one_line(here("up", "--model", model, *state), 2, "up already")
        routed = here("verify", model, "--router", found["router"]["grpc"], "--json")
        assert routed.returncode == 0, routed.stderr
        shown = expertmesh("status", "--json", *state)
        assert shown.returncode == 0, shown.stderr
        assert document(shown)["servers"][0]["id"] == found["servers"][0]["id"]
    finally:
        standing = load(tmp_path / "state")
        down = here("down", *state)
    assert standing is not None
    assert standing.local_ray is not None
    assert down.returncode == 0, down.stderr
    assert "stopped tried and its local Ray" in down.stdout
    assert standing.local_ray.pids() == []
    assert not standing.local_ray.temp_dir.exists()
    assert load(tmp_path / "state") is None


def test_a_bad_file_is_one_line_and_status_2(model: Path, states: Path, tmp_path: Path, here: Run) -> None:
    out = tmp_path / "out"
    bad = tmp_path / "bad.safetensors"

    def layer(layer: object, input: Path, output: Path) -> Completed:
        return here("layer", model, "--layer", layer, "--input", input, "--output", output, "--json")

    assert_one_line(layer(7, states, out), 2, "layer '7'", "(0, 1, 2)")
    assert_one_line(layer(1, bad, out), 2, str(bad), "no such file")
    assert_one_line(layer(1, states, tmp_path / "no" / "out"), 2, "no such directory")
    save_file({"x": torch.zeros(1)}, bad)
    assert_one_line(layer(1, bad, out), 2, "no key 'hidden_states'", "it has x")
    x_TD = torch.zeros(5, DIM)
    x_TD[3, 1] = float("nan")
    save_file({"hidden_states": x_TD}, bad)
    assert_one_line(layer(1, bad, out), 2, "NaN or inf in row 3")
    save_file({"hidden_states": torch.zeros(0, DIM)}, bad)
    assert_one_line(layer(1, bad, out), 2, f"shape [0, {DIM}]", "T >= 1")
    save_file({"hidden_states": torch.zeros(2, DIM, dtype=torch.float64)}, bad)
    assert_one_line(layer(1, bad, out), 2, "torch.float64", "bfloat16")
    assert not out.exists()


def test_a_router_that_is_not_there_is_one_line_and_status_1(model: Path, here: Run) -> None:
    assert_one_line(here("verify", model, "--router", "127.0.0.1:1", "--json"), 1, "127.0.0.1:1")
    assert_one_line(here("load", "--router", "127.0.0.1:1", "--json"), 1, "127.0.0.1:1")
