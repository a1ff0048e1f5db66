"""Routing traces: what is written is read, what they say of the load is right, what cannot be used is named."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import columns
from cluster.traces import RoutingTrace, TraceBatch, load_matrix
from protos.errors import InvalidRequest
from protos.tracefile import METADATA_KEY, SCHEMA, RoutedTokens, TraceInfo, TraceWriter

INFO = TraceInfo(model="m", layers=("0", "2", "10"), num_experts=8, num_choices=9, top_k=2)


def block(time_s: float, layer: str, experts: list[list[int]], *, first: int = 0) -> RoutedTokens:
    expert_TK = np.array(experts, dtype=np.int32)
    return RoutedTokens(
        time_s=time_s,
        layer=layer,
        token_T=np.arange(first, first + len(expert_TK)),
        expert_TK=expert_TK,
        weight_TK=np.where(expert_TK >= 0, 0.5, 0.0).astype(np.float32),
    )


def written(path: Path, *blocks: RoutedTokens, info: TraceInfo = INFO) -> RoutingTrace:
    with TraceWriter(path, info) as writer:
        writer.write(blocks)
    return RoutingTrace(path)


def table(**columns: pa.Array | list[object] | None) -> pa.Table:
    """Two rows that are a trace, with some columns replaced or (None) left out."""
    whole: dict[str, pa.Array | list[object] | None] = {
        "time_s": [0.0, 1.0],
        "layer": ["0", "2"],
        "token": [0, 0],
        "expert_ids": [[0, 1], [2, 3]],
        "weights": [[0.5, 0.5], [0.75, 0.25]],
    }
    return pa.table({name: column for name, column in (whole | columns).items() if column is not None})


@st.composite
def blocks(draw: st.DrawFn) -> list[RoutedTokens]:
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    found = []
    for _ in range(draw(st.integers(1, 5))):
        num_tokens, top_k = draw(st.integers(1, 30)), draw(st.integers(1, 4))
        found.append(
            RoutedTokens(
                time_s=float(rng.uniform(0, 10)),
                layer=str(rng.choice(INFO.layers)),
                token_T=rng.integers(0, 1 << 40, num_tokens),
                expert_TK=rng.integers(-1, 9, (num_tokens, top_k)).astype(np.int32),
                weight_TK=rng.random((num_tokens, top_k), dtype=np.float32),
            )
        )
    return found


def rows_of_batch(batch: TraceBatch) -> list[object]:
    return [
        (
            batch.time_s_T[t],
            INFO.layers[batch.layer_T[t]],
            batch.token_T[t],
            batch.expert_P[begin:end].tolist(),
            batch.weight_P[begin:end].tolist(),
        )
        for t, (begin, end) in enumerate(zip(batch.first_T1, batch.first_T1[1:], strict=False))
    ]


@given(given_blocks=blocks())
def test_what_is_written_is_read_in_the_same_order(
    given_blocks: list[RoutedTokens], tmp_path_factory: pytest.TempPathFactory
) -> None:
    trace = written(tmp_path_factory.mktemp("trace") / "t.parquet", *given_blocks)
    assert trace.info == INFO
    read = [row for batch in trace.batches() for row in rows_of_batch(batch)]
    assert read == [
        (given.time_s, given.layer, given.token_T[t], given.expert_TK[t].tolist(), given.weight_TK[t].tolist())
        for given in given_blocks
        for t in range(len(given.token_T))
    ]
    assert trace.num_tokens == len(read)


def test_a_file_has_its_name_once_it_is_whole_and_leaves_nothing_if_it_never_is(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "t.parquet", INFO)
    writer.write([block(0.0, "0", [[0, 1]])])
    assert not (tmp_path / "t.parquet").exists()
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]
    with pytest.raises(pa.ArrowInvalid), TraceWriter(tmp_path / "u.parquet", INFO) as writer:
        writer.write([replace(block(0.0, "0", [[0, 1]]), weight_TK=np.zeros((1, 1), dtype=np.float32))])
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]


def test_a_file_at_its_limit_takes_no_more_and_counts_what_it_leaves_out(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t.parquet", INFO, max_bytes=1000) as writer:
        for second in range(10):
            writer.write([block(float(second), "0", [[0, 1]] * 100)])
    assert 0 < writer.num_tokens < 1000
    assert writer.num_tokens + writer.num_left_out == 1000
    assert RoutingTrace(tmp_path / "t.parquet").num_tokens == writer.num_tokens


def test_a_trace_longer_than_a_chunk_is_read_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "CHUNK_ROWS", 64)
    trace = written(tmp_path / "t.parquet", *(block(float(i), "2", [[i % 8, 8]] * 10, first=10 * i) for i in range(20)))
    batches = list(trace.batches())
    assert max(len(batch.token_T) for batch in batches) == 64
    assert np.concatenate([batch.token_T for batch in batches]).tolist() == list(range(200))


# ---------------------------------------------------------------------- load


@given(given_blocks=blocks(), window_s=st.floats(0.5, 20), share=st.floats(0.01, 1))
def test_the_load_of_a_window_is_what_was_routed_in_it_and_needs_a_server(
    given_blocks: list[RoutedTokens], window_s: float, share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    info = replace(INFO, sampled_share=share)
    trace = written(tmp_path_factory.mktemp("trace") / "t.parquet", *given_blocks, info=info)
    first_s, last_s = trace.span_s
    windows = load_matrix(trace, window_s)
    rest_s = last_s - windows[-1][0]  # at most half a window is left out, at least half of one is covered
    assert len(windows) == 1 or window_s / 2 <= rest_s < window_s * 3 / 2
    for number, (begin_s, load_LE) in enumerate(windows):
        assert begin_s == first_s + number * window_s
        length_s = min(rest_s, window_s) or window_s if number == len(windows) - 1 else window_s
        pairs_LE = np.zeros((3, 8))
        for routed in given_blocks:
            if int((routed.time_s - first_s) / window_s) == number:
                for expert in routed.expert_TK[(routed.expert_TK >= 0) & (routed.expert_TK < 8)].tolist():
                    pairs_LE[INFO.layers.index(routed.layer), expert] += 1
        assert load_LE * share * length_s == pytest.approx(pairs_LE)


def test_load_is_in_pairs_per_second_of_each_layer_and_expert(tmp_path: Path) -> None:
    info = replace(INFO, sampled_share=0.5)
    trace = written(
        tmp_path / "t.parquet",
        block(100.0, "0", [[0, 1], [0, 8]]),
        block(101.0, "10", [[7, -1]]),
        block(102.0, "0", [[3, 0]] * 4),
        block(103.99, "2", [[3, 4]]),
        info=info,
    )
    (first_s, first_LE), (second_s, second_LE) = load_matrix(trace, 2.0)
    assert (first_s, second_s) == (100.0, 102.0)
    assert first_LE[0].tolist() == [2, 1, 0, 0, 0, 0, 0, 0]  # 2 pairs of a half sample in 2 s
    assert first_LE[2].tolist() == [0, 0, 0, 0, 0, 0, 0, 1]
    assert second_LE[0, :4].tolist() == pytest.approx([4 / 0.995, 0, 0, 4 / 0.995])
    [(whole_s, whole_LE)] = load_matrix(trace)
    assert whole_s == 100.0
    assert whole_LE.sum() == pytest.approx(14 / 0.5 / 3.99)


@pytest.mark.parametrize(
    ("window_s", "message"),
    [
        (0.0, "window_s is 0.0, it must be above 0"),
        (float("nan"), "window_s is nan"),
        (1e-9, r"window_s is 1e-09: 1000000000 windows of 3 layers with 8 experts take \d+ bytes, limit is 1073741824"),
    ],
)
def test_windows_that_cannot_be_are_refused(tmp_path: Path, window_s: float, message: str) -> None:
    trace = written(tmp_path / "t.parquet", block(0.0, "0", [[0]]), block(1.0, "0", [[0]]))
    with pytest.raises(InvalidRequest, match=message):
        load_matrix(trace, window_s)


# ---------------------------------------------------------------------- files by others


def test_a_trace_without_our_metadata_says_with_its_rows_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(table(layer=["layer.10", "layer.2"], time_s=[0, 4]), path)  # and lists of int64 and float64
    trace = RoutingTrace(path)
    assert trace.info == TraceInfo(
        model="", layers=("layer.2", "layer.10"), num_experts=4, num_choices=4, top_k=2, sampled_share=1.0
    )
    [(_, load_LE)] = load_matrix(trace)
    assert load_LE.tolist() == [[0, 0, 0.25, 0.25], [0.25, 0.25, 0, 0]]


def test_the_files_of_a_directory_are_one_trace(tmp_path: Path) -> None:
    written(tmp_path / "b.parquet", block(5.0, "0", [[1]]))
    written(tmp_path / "a.parquet", block(1.0, "0", [[0]]))
    trace = RoutingTrace(tmp_path)
    assert [float(batch.time_s_T[0]) for batch in trace.batches()] == [1.0, 5.0]
    assert trace.span_s == (1.0, 5.0)
    other = TraceInfo(model="n", layers=("0",), num_experts=8, num_choices=8, top_k=2)
    written(tmp_path / "c.parquet", block(5.0, "0", [[1]]), info=other)
    with pytest.raises(InvalidRequest, match=r"c\.parquet: is not of the same trace as a\.parquet"):
        RoutingTrace(tmp_path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"weights": None}, r"no column 'weights' \(it has time_s, layer, token, expert_ids\)"),
        ({"time_s": ["a", "b"]}, "column time_s has type string, expected float64"),
        ({"layer": [0, 2]}, "column layer has type int64, expected string"),
        ({"token": [0.5, 1.5]}, "column token has type double, expected int64"),
        ({"expert_ids": [0, 1]}, "column expert_ids has type int64, expected list<int32>"),
        ({"expert_ids": [["a"], ["b"]]}, r"column expert_ids has type list<.*string>, expected list<int32>"),
        ({"weights": [[1, 2], [3, 4]]}, r"column weights has type list<.*int64>, expected list<float32>"),
        ({"time_s": [0.0, None]}, "time_s is None in row 1, it must not be null"),
        ({"time_s": [0.0, float("inf")]}, "time_s is inf in row 1, it must be finite"),
        ({"layer": ["0", "3"]}, "layer is '3' in row 1, the trace's layers are 0, 2, 10"),
        ({"expert_ids": [[0, 1], [2, 9]]}, r"expert_ids is \[2, 9\] in row 1, limit is 0..8, or -1 for no expert"),
        ({"expert_ids": [[0, -2], [2, 3]]}, r"expert_ids is \[0, -2\] in row 0, limit is 0..8"),
        ({"expert_ids": [[0, 1], [2, 1 << 40]]}, "expert_ids in row 0 or after is no int32"),
        ({"expert_ids": [[0, 1], [2, None]]}, "expert_ids has a null among rows 0 and after"),
        ({"weights": [[0.5, 0.5], [1.0]]}, r"weights is \[1.0\] in row 1, it must have as many elements as expert_ids"),
        ({"weights": [[0.5, float("nan")], [1.0, 0.0]]}, r"weights is \[0.5, nan\] in row 0, they must be finite"),
    ],
)
def test_what_cannot_be_used_is_named_with_file_column_value_and_limit(
    tmp_path: Path, columns: dict[str, list[object] | None], message: str
) -> None:
    with TraceWriter(tmp_path / "ours.parquet", INFO) as writer:
        writer.write([block(0.0, "0", [[0]])])
    metadata = pq.read_schema(tmp_path / "ours.parquet").metadata
    path = tmp_path / "t.parquet"
    pq.write_table(table(**columns).replace_schema_metadata({METADATA_KEY: metadata[METADATA_KEY]}), path)
    with pytest.raises(InvalidRequest, match=message) as caught:
        list(RoutingTrace(path).batches())
    assert caught.value.message.startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b'{"version": 2, "layers": []}', "schema version is 2, supported is 1"),
        (b"{", "cannot be used"),
        (b'{"version": 1, "layers": ["0"]}', "cannot be used"),
        (
            b'{"version": 1, "model": "", "layers": ["0"], "num_experts": 8, "num_choices": 7, "top_k": 1}',
            "num_choices=7",
        ),
    ],
)
def test_metadata_that_cannot_be_used_is_refused(tmp_path: Path, document: bytes, message: str) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(SCHEMA.with_metadata({METADATA_KEY: document}).empty_table(), path)
    with pytest.raises(InvalidRequest, match=message):
        RoutingTrace(path)


def test_files_that_are_no_traces_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    with pytest.raises(InvalidRequest, match=r"t\.parquet: no such file"):
        RoutingTrace(path)
    with pytest.raises(InvalidRequest, match=r"no \*\.parquet file in this directory"):
        RoutingTrace(tmp_path)
    path.write_bytes(b"PAR1 but no more")
    with pytest.raises(InvalidRequest, match="not a readable Parquet file"):
        RoutingTrace(path)
    pq.write_table(SCHEMA.empty_table(), path)
    with pytest.raises(InvalidRequest, match="has no rows"):
        load_matrix(RoutingTrace(path))


def test_a_file_that_is_damaged_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    written(path, *(block(float(i), "0", [[i % 8, (i + 1) % 8]] * 50, first=50 * i) for i in range(100)))
    content = bytearray(path.read_bytes())
    content[100 : len(content) // 2] = bytes(len(content) // 2 - 100)
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=r"t\.parquet: row 0 and after cannot be read"):
        list(RoutingTrace(path).batches())
