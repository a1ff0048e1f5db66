"""`expertmesh plan`: load matrices in every form, plans within their budget that can be planned from again, one line
for whatever cannot be."""

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors

from benchmarks.load_matrices import deepseek_v3_like, zipf
from cluster.cli import main
from cluster.loadfile import LoadFile, read_load
from cluster.planfile import read_plan
from cluster.run_plan import Wanted, run_plan
from protos.errors import InvalidRequest
from protos.tracefile import RoutedTokens, TraceInfo, TraceWriter

LOAD_LE = zipf(1.2, seed=0, num_layers=3, num_experts=8)


@pytest.fixture
def matrix(tmp_path: Path) -> Path:
    path = tmp_path / "load.safetensors"
    save_file({"load": LOAD_LE}, path)
    return path


def named(load_LE: npt.NDArray[np.float64]) -> LoadFile:
    return LoadFile(layers=tuple(map(str, range(len(load_LE)))), load_LE=load_LE)


def planned(load_LE: npt.NDArray[np.float64], **wanted: Any) -> dict[str, Any]:
    return run_plan(named(load_LE), Wanted(**wanted), before=None)


def again(tmp_path: Path, document: dict[str, Any], load_LE: npt.NDArray[np.float64], **wanted: Any) -> dict[str, Any]:
    """A plan that starts from what a document says is there."""
    path = tmp_path / "before.json"
    path.write_text(json.dumps(document))
    load = named(load_LE)
    return run_plan(load, Wanted(**wanted), before=read_plan(path, load))


def assert_consistent(document: dict[str, Any], load_LE: npt.NDArray[np.float64]) -> None:
    """The copies are a plan, and everything else in the document is what they say."""
    copies, num_servers = document["copies"], document["num_servers"]
    (num_layers, num_experts) = load_LE.shape
    assert len(copies) == len({tuple(copy[:3]) for copy in copies}) == document["num_copies"]
    assert document["num_copies"] <= document["budget_copies"]
    shares = Counter[tuple[int, int]]()
    load_LS = np.zeros((num_layers, num_servers))
    for layer, expert, server, share in copies:
        shares[layer, expert] += share
        load_LS[layer, server] += share * load_LE[layer, expert]
    assert set(shares) == {(layer, expert) for layer in range(num_layers) for expert in range(num_experts)}
    assert [*shares.values()] == pytest.approx([1.0] * len(shares))
    count = Counter((layer, expert) for layer, expert, _, _ in copies)
    for row, layer in enumerate(document["layers"]):
        ours = [copy for copy in copies if copy[0] == row]
        most = load_LS[row].max()
        assert layer["balancedness"] == pytest.approx(load_LS[row].mean() / most if most else 1.0)
        assert layer["extra_copies"] == layer["copies"] - num_experts == len(ours) - num_experts
        assert layer["copies_per_server"] == [sum(copy[2] == s for copy in ours) for s in range(num_servers)]
        assert layer["single_copy_experts"] == [e for e in range(num_experts) if count[row, e] == 1]
        lost = max(
            sum(load_LE[row, e] for _, e, server, _ in ours if server == s and count[row, e] == 1)
            for s in range(num_servers)
        )
        if document["survive"] <= 1:
            assert layer["mass_at_risk"] == pytest.approx(lost / load_LE[row].sum() if load_LE[row].any() else 0.0)
    assert document["worst_balancedness"] == min(layer["balancedness"] for layer in document["layers"])
    assert document["single_copy_experts"] == sum(len(layer["single_copy_experts"]) for layer in document["layers"])


@settings(max_examples=30)
@given(
    num_layers=st.integers(1, 3),
    num_experts=st.integers(1, 12),
    servers=st.integers(1, 7),
    extra=st.integers(0, 20),
    survive=st.integers(0, 1),
    exponent=st.floats(0, 3),
)
def test_every_plan_has_each_expert_within_the_budget_and_describes_itself(
    num_layers: int, num_experts: int, servers: int, extra: int, survive: int, exponent: float
) -> None:
    load_LE = zipf(exponent, seed=1, num_layers=num_layers, num_experts=num_experts)
    document = planned(load_LE, servers=servers, budget_copies=load_LE.size + extra, survive=min(survive, servers - 1))
    assert_consistent(document, load_LE)
    json.dumps(document, allow_nan=False)


@pytest.mark.parametrize("unit", [2.0**-40, 2.0**100])  # powers of two, so that no tie is rounded apart
def test_a_plan_does_not_depend_on_the_unit_of_the_load(unit: float) -> None:
    whole = planned(LOAD_LE, servers=3, budget_copies=30)
    other = planned(LOAD_LE * unit, servers=3, budget_copies=30)
    assert [copy[:3] for copy in other["copies"]] == [copy[:3] for copy in whole["copies"]]


def test_a_load_of_nothing_is_planned_too() -> None:
    load_LE = np.zeros((2, 5))
    document = planned(load_LE, servers=2)
    assert_consistent(document, load_LE)
    assert document["mass_at_risk"] == 0.0


def test_without_a_budget_every_expert_has_one_copy() -> None:
    document = planned(LOAD_LE, servers=3)
    assert (document["budget_copies"], document["num_copies"], document["extra_copies"]) == (24, 24, 0)


def test_surviving_a_loss_takes_a_second_copy_of_everything() -> None:
    document = planned(LOAD_LE, servers=3, budget_copies=48, survive=1)
    assert_consistent(document, LOAD_LE)
    assert document["single_copy_experts"] == 0
    assert document["mass_at_risk"] == 0.0


def test_servers_may_differ_in_speed_and_room() -> None:
    document = planned(LOAD_LE, servers=3, speeds=(2.0, 1.0, 1.0), server_copies=(20, 6, 4))
    assert document["budget_copies"] == 30
    assert all(used <= room for used, room in zip(document["copies_per_server"], (20, 6, 4), strict=True))
    load_LS = np.zeros((3, 3))
    for layer, expert, server, share in document["copies"]:
        load_LS[layer, server] += share * LOAD_LE[layer, expert]
    relative_LS = load_LS / [2.0, 1.0, 1.0]
    for row, layer in enumerate(document["layers"]):
        assert layer["balancedness"] == pytest.approx(load_LS[row].sum() / 4 / relative_LS[row].max())


# ---------------------------------------------------------------------- planning again


def test_planning_again_for_the_same_load_moves_nothing(tmp_path: Path) -> None:
    first = planned(LOAD_LE, servers=3, budget_copies=30)
    second = again(tmp_path, first, LOAD_LE, servers=3, budget_copies=30)
    assert second["moved_copies"] == 0
    assert [copy[:3] for copy in second["copies"]] == [copy[:3] for copy in first["copies"]]


def test_copies_on_servers_that_are_gone_move_whatever_the_limit_on_moves(tmp_path: Path) -> None:
    first = planned(LOAD_LE, servers=4, budget_copies=30)
    second = again(tmp_path, first, LOAD_LE, servers=3, budget_copies=30, max_moves=0)
    assert_consistent(second, LOAD_LE)
    held = Counter((layer, expert) for layer, expert, server, _ in first["copies"] if server < 3)
    assert second["moved_copies"] == sum(not held[layer, expert] for layer in range(3) for expert in range(8))
    old = {tuple(copy[:3]) for copy in first["copies"]}
    for row, layer in enumerate(second["layers"]):
        assert layer["moved_copies"] == sum(copy[0] == row and tuple(copy[:3]) not in old for copy in second["copies"])


def test_a_limit_on_moves_is_kept(tmp_path: Path) -> None:
    first = planned(LOAD_LE, servers=4, budget_copies=32)
    moved = [
        again(tmp_path, first, np.roll(LOAD_LE, 3, axis=1), servers=4, budget_copies=32, max_moves=moves)[
            "moved_copies"
        ]
        for moves in (0, 2, 100)
    ]
    assert moved[0] == 0
    assert moved[1] <= 2
    assert moved[2] > 2


def test_a_plan_from_a_larger_one_fits_the_smaller_budget(tmp_path: Path) -> None:
    first = planned(LOAD_LE, servers=3, budget_copies=48, survive=1)
    second = again(tmp_path, first, LOAD_LE, servers=3, budget_copies=30)
    assert_consistent(second, LOAD_LE)


# ---------------------------------------------------------------------- load matrices in files


def write_trace(path: Path) -> None:
    """One second in which every expert of every layer gets as many pairs as LOAD_LE has thousands."""
    info = TraceInfo(model="m", layers=("0", "1", "2"), num_experts=8, num_choices=8, top_k=1, sampled_share=0.5)
    with TraceWriter(path, info) as writer:
        for row in range(3):
            expert_T = np.repeat(np.arange(8), np.round(LOAD_LE[row] / 1e3).astype(int)).astype(np.int32)
            for time_s in (0.0, 1.0):
                writer.write(
                    [
                        RoutedTokens(
                            time_s=time_s,
                            layer=str(row),
                            token_T=np.arange(len(expert_T)),
                            expert_TK=expert_T[:, None],
                            weight_TK=np.ones((len(expert_T), 1), dtype=np.float32),
                        )
                    ]
                )


def test_a_load_matrix_is_the_same_from_every_kind_of_file(tmp_path: Path, matrix: Path) -> None:
    np.savez(tmp_path / "a.npz", load=LOAD_LE)
    save_tensors({"load": torch.from_numpy(LOAD_LE).to(torch.float32)}, tmp_path / "b.safetensors")
    lists, cells = list(LOAD_LE), [(row, expert) for row in range(3) for expert in range(8)]
    pq.write_table(pa.table({"load": lists}), tmp_path / "lists.parquet")
    pq.write_table(pa.table({str(e): LOAD_LE[:, e] for e in range(8)}), tmp_path / "wide.parquet")
    cells_table = {
        "layer": [str(row) for row, _ in cells],
        "expert": [expert for _, expert in cells],
        "load": [LOAD_LE[cell] for cell in cells],
    }
    pq.write_table(pa.table(cells_table), tmp_path / "cells.parquet")
    for name in ("load.safetensors", "a.npz", "b.safetensors", "lists.parquet", "wide.parquet", "cells.parquet"):
        found = read_load(tmp_path / name)
        assert found.layers == ("0", "1", "2"), name
        assert found.load_LE == pytest.approx(LOAD_LE, rel=1e-6), name


def test_a_routing_trace_is_a_load_as_well(tmp_path: Path) -> None:
    write_trace(tmp_path / "trace.parquet")
    found = read_load(tmp_path / "trace.parquet")
    assert found.load_LE == pytest.approx(np.round(LOAD_LE / 1e3) * 4)  # twice as often, half of it sampled
    assert read_load(tmp_path).load_LE.tolist() == found.load_LE.tolist()  # a directory of them, too


def test_layers_with_names_keep_them(tmp_path: Path) -> None:
    table = pa.table({"layer": ["decoder.1", "decoder.3", "encoder.0"], "load": list(LOAD_LE)})
    pq.write_table(table, tmp_path / "l.parquet")
    load = read_load(tmp_path / "l.parquet")
    document = run_plan(load, Wanted(servers=2), before=None)
    assert [layer["layer"] for layer in document["layers"]] == ["decoder.1", "decoder.3", "encoder.0"]
    assert {copy[0] for copy in document["copies"]} == {0, 1, 2}
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(InvalidRequest, match=r"plan of another model: layers decoder\.1, .*, the load has 0, 1, 2"):
        read_plan(tmp_path / "plan.json", named(LOAD_LE))


def write_bad(path: Path, kind: str) -> None:
    nan_LE = LOAD_LE.copy()
    nan_LE[1, 2] = np.nan
    if path.suffix == ".npz":
        np.savez(path, load={"nan": nan_LE, "shape": LOAD_LE[0], "dtype": LOAD_LE > 0}.get(kind, LOAD_LE))
        if kind == "key":
            np.savez(path, other=LOAD_LE)
        if kind == "pickle":
            np.savez(path, load=np.array([{}, None]))
        if kind == "broken":
            path.write_bytes(path.read_bytes()[:200])
        if kind == "member":
            np.savez_compressed(path, load=LOAD_LE)
            data = bytearray(path.read_bytes())
            data[80:100] = b"\xff" * 20  # the directory and its checksums are whole
            path.write_bytes(data)
        if kind == "npy":
            with path.open("wb") as file:
                np.save(file, LOAD_LE)
    elif path.suffix == ".safetensors":
        save_tensors({"load": torch.ones(2, 2, dtype=torch.bfloat16)}, path)
        if kind == "negative":
            save_file({"load": -LOAD_LE}, path)
        if kind == "key":
            save_file({"w": LOAD_LE}, path)
        if kind == "broken":
            path.write_bytes(b"\xff" * 100)
        if kind == "empty":
            save_file({"load": np.zeros((0, 4))}, path)
    elif kind == "text":
        pq.write_table(pa.table({"a": ["x"]}), path)
    elif kind == "scalar":
        pq.write_table(pa.table({"load": [1.0]}), path)
    elif kind == "ragged":
        pq.write_table(pa.table({"load": [[1.0, 2.0], [1.0]]}), path)
    elif kind == "twice":
        pq.write_table(pa.table({"layer": ["0", "0"], "expert": [1, 1], "load": [1.0, 2.0]}), path)
    elif kind == "names":
        pq.write_table(pa.table({"layer": ["0", "0"], "load": [[1.0], [2.0]]}), path)
    elif kind == "expert":
        pq.write_table(pa.table({"layer": ["0"], "expert": [-1], "load": [1.0]}), path)
    else:
        path.write_bytes(b"neither")


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("l.npz", "nan", r"load\[1, 2\] is nan, it must be 0 or more"),
        ("l.npz", "shape", r"load has shape \[8\], expected \[L, E\]"),
        ("l.npz", "dtype", "load has dtype bool"),
        ("l.npz", "key", r"no key 'load' \(it has other\)"),
        ("l.npz", "pickle", r"not a readable \.npz file"),
        ("l.npz", "broken", r"not a readable \.npz file"),
        ("l.npz", "member", r"not a readable \.npz file"),
        ("l.npz", "npy", r"not a readable \.npz file"),
        ("l.safetensors", "bf16", "load has dtype BF16, expected F64, F32, F16 or integers"),
        ("l.safetensors", "negative", r"load\[0, 0\] is -\d+.*, it must be 0 or more"),
        ("l.safetensors", "key", r"no key 'load' \(it has w\)"),
        ("l.safetensors", "broken", "not a readable safetensors file"),
        ("l.safetensors", "empty", r"load has shape \[0, 4\]"),
        ("l.parquet", "text", "column a has type string, expected numbers"),
        ("l.parquet", "scalar", "column load has type double, expected a list of numbers for each layer"),
        ("l.parquet", "ragged", r"load has layers of \[1, 2\] experts, expected one E"),
        ("l.parquet", "twice", "layer 0, expert 1 is there again in row 1"),
        ("l.parquet", "names", "layer has 2 rows but 1 names"),
        ("l.parquet", "expert", "expert is -1 in row 0, limit is 0.."),
        ("l.parquet", "broken", "not a readable Parquet file"),
        ("l.csv", "broken", r"not named \.safetensors, \.npz or \.parquet"),
    ],
)
def test_a_file_that_is_no_load_matrix_is_named_with_what_is_wrong(
    tmp_path: Path, name: str, kind: str, message: str
) -> None:
    write_bad(tmp_path / name, kind)
    with pytest.raises(InvalidRequest, match=message) as caught:
        read_load(tmp_path / name)
    assert caught.value.message.startswith(str(tmp_path / name))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"servers": 0}, r"--servers is 0, limit is 1\.\.65536"),
        ({"servers": 10**9}, "--servers is 1000000000"),
        ({"servers": 2, "budget_copies": 23}, "--budget-copies is 23, 3 x 8 experts need at least 24"),
        ({"servers": 2, "survive": -1}, "--survive is -1"),
        ({"servers": 2, "survive": 2}, "--survive is 2, limit is one less than --servers"),
        ({"servers": 2, "max_moves": -1}, "--max-moves is -1"),
        ({"servers": 2, "speeds": (1.0,)}, "--server-speeds has 1 values, --servers is 2"),
        ({"servers": 2, "speeds": (1.0, 0.0)}, r"--server-speeds is 1\.0, 0\.0, every one must be above 0"),
        ({"servers": 2, "speeds": (1.0, float("nan"))}, "--server-speeds"),
        ({"servers": 2, "server_copies": (10, -1)}, "--server-copies is 10, -1"),
        ({"servers": 2, "server_copies": (10, 13)}, "--server-copies is 23 in all, 3 x 8 experts need 24"),
    ],
)
def test_arguments_that_cannot_be_are_refused_with_value_and_limit(wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        planned(LOAD_LE, **wanted)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a plan: JSONDecodeError"),
        ("[]", "not a plan: TypeError"),
        ("{}", "not a plan: KeyError 'copies'"),
        ('{"copies": [[0, 0, 0]]}', r"copies\[0\] is \[0, 0, 0\], expected \[layer, expert, server, share\]"),
        ('{"copies": [[0, 0, 0, 1], [3, 0, 0, 1]]}', r"copies\[1\] is \[3, 0, 0, 1\], .* with layer in 0\.\.2"),
        ('{"copies": [[0, 8, 0, 1]]}', r"expert in 0\.\.7"),
        ('{"copies": [[0, 0, -1, 1]]}', r"server in 0\.\.65535"),
        ('{"copies": [[0, 0, 0, 1.5]]}', r"share above 0 up to 1"),
        ('{"copies": [[0, 0, 0, 0]]}', r"share above 0 up to 1"),
        ('{"copies": [[0, 0, 0, NaN]]}', r"share above 0 up to 1"),
        ('{"copies": [[0, 0, 0, 1], [0, 0, 0, 1]]}', r"copies\[1\] is there twice"),
        ('{"copies": 7}', r"copies\[0\] is 7"),
        ('{"copies": [], "layers": [{"layer": "0"}], "num_experts": 4}', "another model: 1 layers of 4 experts"),
        ('{"copies": [], "layers": 5}', "not a plan"),
    ],
)
def test_a_plan_that_cannot_be_planned_from_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(InvalidRequest, match=message) as caught:
        read_plan(path, named(LOAD_LE))
    assert caught.value.message.startswith(str(path))


# ---------------------------------------------------------------------- the command


def expertmesh(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", "plan", *map(str, args)], capture_output=True, text=True, timeout=120
    )


def test_the_command_prints_one_document_that_it_can_start_from(matrix: Path, tmp_path: Path) -> None:
    done = expertmesh("--load", matrix, "--servers", 3, "--budget-copies", 30, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    document = json.loads(done.stdout)
    assert_consistent(document, LOAD_LE)
    (tmp_path / "plan.json").write_text(done.stdout)
    args = ("--load", matrix, "--servers", 3, "--budget-copies", 30, "--from", tmp_path / "plan.json")
    done = expertmesh(*args, "--max-moves", 4, "--json")
    assert json.loads(done.stdout)["moved_copies"] == 0
    lines = expertmesh(*args).stdout.splitlines()
    assert any(line.split()[:1] == ["all"] and "at worst" in line for line in lines)
    assert "3 layers of 8 experts on 3 servers" in lines[-1]


def test_a_large_model_is_planned_quickly_and_without_torch_or_ray(tmp_path: Path) -> None:
    load_LE = deepseek_v3_like(seed=0, num_layers=61)
    np.savez(tmp_path / "load.npz", load=load_LE)
    code = (
        "import atexit, sys; sys.argv[0] = 'expertmesh'; from cluster.cli import main; "
        "atexit.register(lambda: print(*sorted({'torch', 'ray', 'transformers', 'pyarrow'} & sys.modules.keys()), "
        "file=sys.stderr)); main()"
    )
    args = ["plan", "--load", str(tmp_path / "load.npz"), "--servers", "32", "--budget-copies", "15800", "--json"]
    began_s = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == ""
    assert time.monotonic() - began_s < 30
    assert_consistent(json.loads(done.stdout), load_LE)


@pytest.mark.parametrize(
    ("args", "part"),
    [
        ((), "--load"),
        (("--load", "{dir}/nosuch.npz", "--servers", "2"), "nosuch.npz: no such file"),
        (("--load", "{dir}/load.safetensors", "--servers", "0"), "--servers is 0"),
        (("--load", "{dir}/load.safetensors", "--servers", "two"), "--servers"),
        (("--load", "{dir}/load.safetensors", "--servers", "2", "--budget-copies", "3"), "--budget-copies is 3"),
        (("--load", "{dir}/load.safetensors", "--servers", "2", "--server-speeds", "1,x"), "--server-speeds is '1,x'"),
        (("--load", "{dir}/load.safetensors", "--servers", "2", "--from", "{dir}/p.json"), "p.json: cannot be read"),
    ],
)
def test_a_bad_argument_is_one_line_and_status_2(
    args: tuple[str, ...], part: str, matrix: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["expertmesh", "plan", *(arg.format(dir=matrix.parent) for arg in args), "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    stdout, stderr = capfd.readouterr()
    assert ended.value.code == 2
    assert stdout == ""
    assert stderr.count("\n") == 1
    assert stderr.startswith("expertmesh: ")
    assert part in stderr
