"""What parsers do with bytes that nobody in his right mind would send: refuse, in bounded memory.

    pytest tests/single/test_fuzz.py                         some hundred examples each, in seconds
    HVDX_FUZZ_EXAMPLES=200000 pytest tests/single/test_fuzz.py -n 2

Inputs are valid messages in which bytes and fields have been changed: few random bytes would get
past the first check. Hypothesis keeps what failed in `.hypothesis` and shows the smallest such.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hvdx.compression import codecs, sparse
from hvdx.errors import PlanError
from hvdx.launch.rendezvous import HEAD_BYTES, Rendezvous
from hvdx.launch.store import Refused, Store
from hvdx.ops import NumpyOps, TensorFlowOps, TorchOps
from hvdx.pipeline.channel import Key
from hvdx.pipeline.plan import Plan
from hvdx.pipeline.post import NumpyCodec, PostChannel
from hvdx.star import Wire
from hvdx.verdict import Picture, from_plain

pytestmark = pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow encountered")
MEGABYTE = 1 << 20
fuzzed = settings(
    max_examples=int(os.environ.get("HVDX_FUZZ_EXAMPLES", "100")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

#: Any JSON, with numbers that are traps: negative, huge, no numbers.
numbers = st.one_of(
    st.integers(-3, 9),
    st.sampled_from([2**31, 2**34 + 1, 2**63, -(2**63), 10**30, 1e308, float("inf"), float("nan")]),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8))
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


@contextlib.contextmanager
def little_memory(limit: int = 16 * MEGABYTE):
    """Fail if what is inside allocates more, through Python or NumPy."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


@st.composite
def damaged(draw, valid: bytes) -> bytes:
    """Draw ``valid`` with some bytes changed, removed, repeated or put in."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 8))
        data[at : at + length] = draw(st.one_of(st.binary(max_size=8), st.just(data[:at] * 2)))
    return bytes(data)


# --- the channel between stages


class Deaf(PostChannel):
    """A channel that takes what a test gives it."""

    def __init__(self, codec: Any) -> None:
        super().__init__([0, 1], 0, codec, 1.0)

    def close(self) -> None: ...
    def _post(self, peer: int, parts: list[Any]) -> None: ...
    def _tell_all(self, message: bytes) -> None: ...
    def _service(self, seconds: float, wanted: int | None = None) -> None: ...
    def _check_peers(self, wanted: int, key: Key) -> None: ...


def torch_codec() -> Any:
    pytest.importorskip("torch")
    from hvdx.integrations.pytorch_channel import TorchCodec

    return TorchCodec()


def tensorflow_codec() -> Any:
    pytest.importorskip("tensorflow")
    from hvdx.integrations.keras3_stages import Codec

    return Codec()


dtypes = st.one_of(
    st.sampled_from(
        ["float32", "<f4", "int64", "bool", "bfloat16", "O", "object", "V8", "(2,)f4", "f4,f4",
         "S0", "U", "resource", "variant", "string", "qint8", "Tensor", "nn", "complex64", "float8"]
    ),
    anything,
)  # fmt: skip
shapes = st.one_of(st.lists(numbers, max_size=4), anything)
tensors = st.one_of(st.none(), st.tuples(dtypes, shapes, st.one_of(st.none(), shapes)), anything)
headers = st.tuples(
    st.one_of(st.just(1), anything),
    st.one_of(st.sampled_from(["F", "B", "fail", "bye"]), anything),
    *[st.one_of(st.integers(0, 3), anything) for _ in range(3)],
    st.one_of(st.just(""), anything),
    st.one_of(
        st.lists(tensors, max_size=3),
        st.fixed_dictionaries({"rank": anything, "error": anything}, optional={"row": anything}),
        anything,
    ),
)
part = st.one_of(st.binary(max_size=64), st.integers(0, 64).map(bytes)).map(bytearray)


@pytest.fixture(scope="module", params=[NumpyCodec, torch_codec, tensorflow_codec])
def codec(request):
    return request.param()


@fuzzed
@given(header=headers, parts=st.lists(part, max_size=3))
@example(header=(1, "F", 0, 1, 0, "", [["f4,(", [1], None]]), parts=[bytearray(4)])
@example(header=(1, "F", 0, 1, 0, "", [["float32", [2], [2**33]]]), parts=[bytearray(8)])
@example(header=(1, "F", 0, 1, 0, "", [["float32", [0, 10**30], None]]), parts=[bytearray()])
@example(header=(1, "fail", 0, 0, 0, "", {"rank": 0, "error": "x", "where": [1]}), parts=[])
def test_the_channel_refuses_what_is_no_message(codec, header, parts):
    channel = Deaf(codec)
    with little_memory(), contextlib.suppress(OSError):
        channel._take(1, [json.dumps(header).encode(), *parts])
    for tensor in (each for _, tensors in channel._arrived.values() for each in tensors):
        assert tensor is None or np.asarray(tensor).nbytes <= 64
        if hasattr(tensor, "untyped_storage"):
            assert tensor.untyped_storage().nbytes() < MEGABYTE
    if channel._failure is not None:
        assert "rank" in str(channel._failure.exception())


VALID = json.dumps([1, "F", 0, 1, 0, "", [["float32", [2, 2], None], None]]).encode()


@fuzzed
@given(header=st.one_of(damaged(VALID), st.binary(max_size=64)), parts=st.lists(part, max_size=3))
@example(header=b"[" * 100_000, parts=[])
def test_the_channel_refuses_what_is_no_header(header, parts):
    with little_memory(), contextlib.suppress(OSError):
        Deaf(NumpyCodec())._take(1, [header, *parts])


# --- messages of the watchdog


def framed(body: bytes) -> bytes:
    return struct.pack("!I", len(body)) + body


REPORT = [[["allreduce", "name", "float32 (3,)", 0.5, [0, 1], "at"]], "at", "last", 0.0, "x"]


@fuzzed
@given(data=st.one_of(damaged(framed(json.dumps({"report": REPORT}).encode())), st.binary()))
@example(data=framed(b"[" * 100_000))
@example(data=b"\xff" * 100)
def test_the_watchdogs_wire_refuses_what_is_no_message(data):
    here, there = socket.socketpair()
    wire = Wire.__new__(Wire)
    there.setblocking(False)
    wire.connection, wire._unsent, wire._unread = there, bytearray(), bytearray()
    with here, there, little_memory(), contextlib.suppress(OSError):
        here.sendall(data)
        list(wire.receive())


@fuzzed
@given(
    report=st.one_of(
        anything,
        st.tuples(
            st.lists(st.tuples(*[anything] * 6), max_size=2), *[anything] * 2, numbers, anything
        ),
        st.tuples(
            st.lists(
                st.tuples(
                    st.text(), st.text(), st.text(), numbers, st.lists(numbers, max_size=3),
                    st.text(),
                ),
                max_size=2,
            ),
            st.text(), st.text(), numbers, st.text(),
        ),
    )
)  # fmt: skip
def test_the_watchdog_refuses_what_is_no_report(report):
    try:
        rebuilt = from_plain(report)
    except ValueError:
        return
    picture = Picture(2, 30.0, 0.0)
    picture.hear(1, rebuilt, 1.0)
    for now in (2.0, 100.0):
        picture.curious(now)
        picture.slow(now)
        picture.stalled(now)


# --- the rendezvous


@pytest.fixture(scope="module")
def rendezvous():
    served = Rendezvous(2).start()
    yield served
    served.close()


@fuzzed
@given(data=st.data())
def test_the_rendezvous_answers_none_who_lacks_the_token(rendezvous, data):
    token = f"{rendezvous.token}:{rendezvous.port}"
    request = f"PUT /{token}/global/0 HTTP/1.1\r\nContent-Length: 3\r\n\r\n".encode()
    head = data.draw(damaged(request))[:HEAD_BYTES]
    parsed = rendezvous._authenticated(head)
    if parsed is not None:
        assert token.encode() in head
        assert 0 <= parsed.length < 10**9


@fuzzed
@given(
    asked=st.lists(
        st.tuples(
            st.sampled_from(["put", "get", "delete"]),
            st.one_of(st.sampled_from(["global", "local", "hvdx"]), st.text(max_size=8)),
            st.one_of(st.sampled_from(["0", "1", "2"]), st.text(max_size=8)),
            st.binary(max_size=2000),
        ),
        max_size=20,
    )
)
def test_the_store_counts_what_it_holds(asked):
    store = Store(2)
    for verb, scope, key, value in asked:
        with contextlib.suppress(Refused):
            if verb == "put":
                store.put(scope, key, value)
            elif verb == "get":
                store.get(scope, key)
            else:
                store.delete(scope)
    held = [value for scope in store._scopes.values() for value in scope.values()]
    assert (store._keys, store._bytes) == (len(held), sum(map(len, held)))


# --- files and gradients


PLAN = Plan(cuts=("b",), place=(0, 1), schedule="1f1b", micro_batches=4).to_json()


@fuzzed
@given(
    text=st.one_of(
        damaged(PLAN.encode()).map(lambda data: data.decode(errors="replace")),
        st.fixed_dictionaries(
            {
                "hvdx_plan": st.just(1),
                "cuts": st.one_of(st.lists(st.text(max_size=2), max_size=3), anything),
                "place": st.one_of(st.lists(numbers, max_size=4), anything),
                "schedule": st.one_of(
                    st.sampled_from(["1f1b", "gpipe", "zbv", "interleaved", "0F0,0B0\n1F0,1B0"]),
                    anything,
                ),
                "micro_batches": st.one_of(st.integers(1, 8), anything),
            },
            optional={"mesh": st.lists(st.lists(numbers, max_size=3), max_size=3)},
        ).map(json.dumps),
    )
)
@example(text="[" * 100_000)
@example(text=PLAN.replace('"micro_batches": 4', '"micro_batches": 1000000000'))
@example(text='{"hvdx_plan": 1, "cuts": [], "place": [1000000000], "schedule": "1f1b", '
              '"micro_batches": 1}')  # fmt: skip
def test_a_plan_that_is_none_is_refused(text):
    with little_memory(64 * MEGABYTE), contextlib.suppress(PlanError):
        Plan.from_json(text)


@pytest.fixture(scope="module", params=["numpy", "torch", "tensorflow"])
def ops(request):
    pytest.importorskip(request.param)
    return {"numpy": NumpyOps, "torch": TorchOps, "tensorflow": TensorFlowOps}[request.param]()


@fuzzed
@given(data=st.binary(min_size=2 * 1032, max_size=2 * 1032), which=st.integers(0, 3))
def test_codecs_make_numbers_of_any_bytes(ops, data, which):
    chosen = [codecs.bfloat16(), codecs.integers(8, 256), codecs.integers(4, 128), codecs.signs()]
    codec = chosen[which]
    width = codec.row_bytes(1024)
    rows = np.array(bytearray((data * 2)[: 2 * width]), np.uint8).reshape(2, width)
    decoded = codec.decode(ops, ops.constant(rows, "uint8"), 1024)
    assert tuple(decoded.shape) == (2, 1024)


@fuzzed
@given(data=st.binary(min_size=48, max_size=48))
@example(data=b"\xff" * 48)
@example(data=bytes(40) + struct.pack("<ii", 2**31 - 1, 2**31 - 1))
def test_sparse_gradients_of_any_bytes_are_read_in_bounded_memory(ops, data):
    size, count = 100_000, 10  # two chunks of indices
    with little_memory():
        try:
            where, values = sparse._read(
                ops, ops.constant(np.array(bytearray(data), np.uint8), "uint8"), count, size
            )
            ops.add_at(ops.zeros((size,), "float32"), where, values)
        except Exception as error:  # what each framework raises for wrong indices or sizes
            assert not isinstance(error, MemoryError)
