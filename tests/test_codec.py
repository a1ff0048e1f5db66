"""The wire: tensors without copies, messages with a trailing payload, errors that survive the round trip."""

import pickle

import grpc
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protos import common_pb2, errors, expert_pb2, router_pb2
from protos.codec import WIRE_DTYPES, decode, encode, read_floats, read_ints, read_tensor, tensor_bytes
from protos.errors import ExpertmeshError, InternalError, InvalidRequest, from_proto, to_proto

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@given(DTYPES, st.integers(0, 7), st.integers(1, 9), st.integers(0, 1 << 30))
def test_a_tensor_survives_the_round_trip_bit_by_bit(dtype: torch.dtype, rows: int, dim: int, seed: int) -> None:
    x = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
    back = read_tensor(bytes(tensor_bytes(x)), WIRE_DTYPES[dtype], (rows, dim), name="x")
    assert back.dtype is dtype
    assert torch.equal(back, x)


def test_reading_a_tensor_shares_the_memory_of_the_message() -> None:
    buffer = encode(expert_pb2.ComputeRequest(call_id=7), tensor_bytes(torch.ones(4, 8)))
    _, payload = decode(expert_pb2.ComputeRequest, buffer)
    x = read_tensor(payload, common_pb2.DTYPE_FLOAT32, (4, 8), name="x")
    start = np.frombuffer(buffer, dtype=np.uint8).__array_interface__["data"][0]
    assert start < x.data_ptr() < start + len(buffer)


def test_a_strided_view_travels_as_its_values() -> None:
    x = torch.arange(24.0).view(4, 6)[:, ::2]
    assert torch.equal(read_tensor(bytes(tensor_bytes(x)), common_pb2.DTYPE_FLOAT32, (4, 3), name="x"), x)


@given(
    st.builds(
        expert_pb2.ComputeRequest,
        call_id=st.integers(0, 2**64 - 1),
        layer=st.text(max_size=20),
        num_rows=st.integers(0, 2**32 - 1),
        timeout_s=st.floats(width=32, allow_nan=False),
        pair_row=st.binary(max_size=300),
        cancel=st.lists(st.integers(0, 2**64 - 1), max_size=5),
    ),
    st.binary(max_size=400),
)
def test_encode_writes_ordinary_protobuf_and_decode_reads_it(head: expert_pb2.ComputeRequest, payload: bytes) -> None:
    buffer = encode(head, payload)
    whole = expert_pb2.ComputeRequest.FromString(buffer)  # another implementation's view of the same bytes
    assert whole.x == payload
    read, view = decode(expert_pb2.ComputeRequest, buffer)
    assert read == head
    assert view == payload
    read, view = decode(expert_pb2.ComputeRequest, whole.SerializeToString())
    assert (read, bytes(view)) == (head, payload)


def test_a_payload_that_is_not_the_last_field_is_still_found() -> None:
    payload_first = expert_pb2.ComputeRequest(x=b"abcd").SerializeToString()
    rest = expert_pb2.ComputeRequest(call_id=3, layer="1").SerializeToString()
    head, view = decode(expert_pb2.ComputeRequest, payload_first + rest)
    assert (head.call_id, head.layer, bytes(view)) == (3, "1", b"abcd")


@given(st.binary(max_size=200))
def test_bytes_that_are_no_message_are_an_invalid_request_or_parse(buffer: bytes) -> None:
    try:
        decode(router_pb2.ForwardRequest, buffer)
    except InvalidRequest as err:
        assert "malformed ForwardRequest" in err.message  # noqa: PT017


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(InvalidRequest, match=r"x has 8 bytes, shape \[2, 3\] of torch.float32 needs 24"):
        read_tensor(bytes(8), common_pb2.DTYPE_FLOAT32, (2, 3), name="x")
    with pytest.raises(InvalidRequest, match=r"x\.dtype is 0"):
        read_tensor(b"", common_pb2.DTYPE_UNSPECIFIED, (0, 3), name="x")
    with pytest.raises(InvalidRequest, match="pair_row has 6 bytes, expected a multiple of 4"):
        read_ints(bytes(6), name="pair_row")
    with pytest.raises(InvalidRequest, match="pair_weight has 8 bytes, expected 12"):
        read_floats(bytes(8), name="pair_weight", count=3)
    with pytest.raises(InvalidRequest, match=r"dtype torch\.float64 does not travel"):
        tensor_bytes(torch.zeros(2, dtype=torch.float64))


ALL_ERRORS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, ExpertmeshError) and kind is not ExpertmeshError
]


@pytest.mark.parametrize("kind", ALL_ERRORS)
def test_every_error_class_survives_the_wire_and_pickle(kind: type[ExpertmeshError]) -> None:
    error = kind("field is 3, limit is 2", retry_after_s=0.5)
    for back in (from_proto(to_proto(error)), pickle.loads(pickle.dumps(error))):
        assert type(back) is kind
        assert (back.message, back.retry_after_s) == (error.message, 0.5)
    assert isinstance(kind.status, grpc.StatusCode)


def test_errors_outside_the_tree_become_internal_without_their_details() -> None:
    proto = to_proto(ValueError("secret"))
    assert isinstance(from_proto(proto), InternalError)
    assert "secret" not in proto.message
    assert isinstance(from_proto(common_pb2.Error(kind="FromTheFuture", message="m")), InternalError)
