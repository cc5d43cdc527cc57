"""docs/wire-format.md is true: NumPy, PyTorch and TensorFlow write the bytes that it shows."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvdx.comm import Work, in_step, operations, through, together
from hvdx.compression import FORMAT, Compression, Compressor, Spec, codecs
from hvdx.ops import NumpyOps, TensorFlowOps, TorchOps

pytestmark = pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow encountered")

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "wire-format.md").read_text()
BLOCKS = re.findall(r"^```vector\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)

CODECS = {
    "bf16": codecs.bfloat16(),
    "int8": codecs.integers(8, 256),
    "int4": codecs.integers(4, 128),
    "onebit": codecs.signs(1024),
}


class Vector:
    """One example: what ranks hold, what they send, what they get."""

    def __init__(self, block: str) -> None:
        self.lines = lines_of(block)
        self.title = self.lines["method"]
        name, *options = self.title.split()
        told = {key: option(x) for key, x in (each.split("=") for each in options)}
        self.compressor = method(name, **told)
        self.ranks = int(self.lines["ranks"])

    def gradients(self, rank: int) -> list[np.ndarray]:
        flat = numbers(self.lines[f"values[{rank}]"])
        if "shape" in self.lines:
            return [flat.reshape([int(side) for side in self.lines["shape"].split()])]
        if "sizes" not in self.lines:
            return [flat]
        sizes = [int(size) for size in self.lines["sizes"].split()]
        return np.split(flat, np.cumsum(sizes)[:-1])

    def expected(self) -> dict[str, bytes]:
        kinds = ("levels", "alltoall", "allgather", "allreduce")
        return {key: octets(told) for key, told in self.lines.items() if key.startswith(kinds)}

    def mean(self) -> np.ndarray:
        return numbers(self.lines["mean"])


def option(text: str) -> Any:
    """Return an option of a method: a number or a word."""
    return text if text.isalpha() else float(text)


def lines_of(block: str) -> dict[str, str]:
    """Return what an example says, by the first word of each line."""
    return dict(re.split(r"\s+", line, maxsplit=1) for line in block.splitlines())


def method(name: str, **options: Any) -> Compressor:
    """Return a method by its name in the document; nothing is too small for it."""
    found: Any = getattr(Compression, name)
    if isinstance(found, Compressor):
        return found
    if name in ("onebit", "topk", "dgc", "randomk", "powersgd"):
        options["min_elements"] = 0
    return found(**options)


def repeated(text: str) -> list[str]:
    """Return the words of ``text``, a word ``x*3`` three times."""
    words = [word.partition("*") for word in text.replace("|", " ").split()]
    return [word for word, _, count in words for _ in range(int(count or 1))]


def numbers(text: str) -> np.ndarray:
    return np.array(repeated(text), np.float32)


def octets(text: str) -> bytes:
    return bytes.fromhex("".join(repeated(text)))


@pytest.fixture(params=["numpy", "torch", "tensorflow"])
def framework(request: pytest.FixtureRequest) -> Any:
    """Return the verbs and the function that makes a tensor."""
    if request.param == "numpy":
        return NumpyOps(), np.array
    pytest.importorskip(request.param)
    library = sys.modules[request.param]
    if request.param == "torch":
        return TorchOps(), library.tensor
    return TensorFlowOps(), library.constant


def run(works: list[Work[Any]], tensor: Any) -> tuple[list[Any], list[Any]]:
    """Run a generator per rank; return their results, and all (rank, request, bytes)."""
    seen = []

    def note(rank: int, request: Any) -> None:
        for each in operations(request):
            seen.append((rank, each, np.asarray(each.tensor).tobytes()))

    noted = [through(work, partial(note, rank), tensor) for rank, work in enumerate(works)]
    return in_step(noted), seen


def named(rank: int, request: Any) -> str:
    kind = request.phase if request.phase == "levels" else type(request).__name__.lower()
    return f"{kind}[{rank}]"


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.startswith("codec")], ids=lambda block: block.split()[1]
)
def test_codecs_are_those_of_the_document(block, framework):
    (ops, tensor), lines = framework, lines_of(block)
    codec, values = CODECS[lines["codec"]], numbers(lines["values"])
    row = np.pad(values, (0, -len(values) % codec.block))[None]
    data = codec.encode(ops, tensor(row), len(values))
    assert np.asarray(data).tobytes().hex(" ") == octets(lines["bytes"]).hex(" ")
    decoded = np.asarray(codec.decode(ops, data, row.shape[1]))[0, : len(values)]
    np.testing.assert_array_equal(decoded, numbers(lines["decoded"]))


METHODS = [Vector(block) for block in BLOCKS if block.startswith("method")]


@pytest.mark.parametrize("vector", METHODS, ids=lambda vector: vector.title)
def test_bytes_are_those_of_the_document(vector, framework):
    ops, tensor = framework
    reduce, works = vector.compressor.reduce, []
    for rank in range(vector.ranks):
        each = []
        for grad in vector.gradients(rank):
            spec = Spec(vector.lines.get("name", ""), grad.shape, "float32", vector.ranks)
            each.append(reduce(ops, tensor(grad), vector.compressor.init(ops, spec)))
        works.append(together(each, ops))
    results, seen = run(works, tensor)
    sent = {named(rank, request): data for rank, request, data in seen}
    assert len(sent) == len(seen), "a collective more than the document shows"
    expected = vector.expected()
    assert {key: data.hex(" ") for key, data in sent.items()} == {
        key: data.hex(" ") for key, data in expected.items()
    }
    for result in results:
        means = [np.asarray(reduced.mean).reshape(-1) for reduced in result]
        np.testing.assert_array_equal(np.concatenate(means), vector.mean())


@pytest.mark.parametrize(
    "row", re.findall(r"^\| `(\w+)` \|(.*?)\|(.*?)\|", DOCUMENT, re.MULTILINE), ids=lambda r: r[0]
)
def test_collectives_are_those_of_the_table(row):
    name, *cells = row
    compressor, ops, shape = method(name), NumpyOps(), (64, 64)
    for ranks, cell in zip((2, 3), cells, strict=True):
        state = compressor.init(ops, Spec("w", shape, "float32", ranks))
        grad = np.ones(shape, np.float32)
        _, seen = run([compressor.reduce(ops, grad, state) for _ in range(ranks)], np.array)
        asked = [(type(r).__name__.lower(), r.phase) for rank, r, _ in seen if rank == 0]
        assert asked == re.findall(r"(\w+) `(\w+)`", cell), ranks


def test_every_method_is_told():
    public = {name for name in vars(Compression) if not name.startswith("_")}
    assert public <= set(re.findall(r"`(\w+)`", DOCUMENT))


def test_the_number_of_the_format():
    assert f"**format {FORMAT}**" in DOCUMENT
    assert re.findall(r"^\| (\d+) \|", DOCUMENT, re.MULTILINE)[-1] == str(FORMAT)


def test_examples_were_found():
    """And none lost to a slip of the parser."""
    assert len(BLOCKS) == DOCUMENT.count("```vector\n") >= 15
