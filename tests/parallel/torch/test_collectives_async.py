"""Handles, in-place operations and groups of ``hvdx.torch``, for every dtype that travels."""

from __future__ import annotations

import pytest
import torch

import hvdx.torch as hvd

EXACT = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64]
REDUCED = [*EXACT, torch.uint8, torch.int8, torch.int16, torch.uint16]
MOVED = [*REDUCED, torch.bool, torch.complex64, torch.complex128, torch.float8_e5m2]
SHAPES = [(), (5,), (2, 3), (2, 1, 3)]


def ranks() -> range:
    return range(hvd.size())


def of_rank(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return ((torch.arange(count) + rank) % 4).view(shape).to(dtype)


def mine(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return of_rank(hvd.rank(), shape, dtype)


def total(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return sum(of_rank(rank, shape, torch.int64) for rank in ranks()).to(dtype)


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    assert torch.equal(one.to(torch.complex128), other.to(torch.complex128)), (one, other)


@pytest.mark.ranks(2)
def test_allreduce_of_every_dtype_and_shape():
    for dtype in REDUCED:
        for shape in SHAPES:
            name = f"{dtype}.{shape}"
            given = mine(shape, dtype)
            same(hvd.allreduce(given, name=name, op=hvd.Sum), total(shape, dtype))
            same(given, mine(shape, dtype))
            handle = hvd.allreduce_async(given, name=name, op=hvd.Sum)
            same(hvd.synchronize(handle), total(shape, dtype))
            same(given, mine(shape, dtype))
            result = hvd.allreduce_(given, name=name, op=hvd.Sum)
            assert result is given
            same(given, total(shape, dtype))


@pytest.mark.ranks(2)
def test_many_operations_under_way():
    kinds = [(dtype, shape) for dtype in REDUCED for shape in SHAPES]
    given = [mine(shape, dtype) for dtype, shape in kinds]
    handles = [hvd.allreduce_async_(tensor, op=hvd.Sum) for tensor in given]
    while not all(map(hvd.poll, handles)):
        pass
    for handle, tensor, (dtype, shape) in zip(handles, given, kinds, strict=True):
        assert hvd.synchronize(handle) is tensor
        same(tensor, total(shape, dtype))


@pytest.mark.ranks(2)
def test_what_is_not_contiguous_is_written_in_place():
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        whole = mine((4, 6), dtype)
        part = whole[:, ::2].t()
        before = whole.clone()
        assert hvd.allreduce_(part, op=hvd.Sum) is part
        same(whole[:, ::2], total((4, 6), dtype)[:, ::2])
        same(whole[:, 1::2], before[:, 1::2])
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.complex64):
        whole = mine((4, 6), dtype)
        part = whole[:, ::2].t()
        assert hvd.broadcast_(part, 1) is part
        same(whole[:, ::2], of_rank(1, (4, 6), dtype)[:, ::2])
        same(whole[:, 1::2], mine((4, 6), dtype)[:, 1::2])


@pytest.mark.ranks(2)
def test_lazily_conjugated_and_negated_tensors():
    given = torch.tensor([1 + 2j]).conj()
    assert hvd.allgather(given).tolist() == [1 - 2j] * hvd.size()
    assert hvd.allreduce(given.imag, op=hvd.Sum).tolist() == [-2.0 * hvd.size()]
    assert hvd.broadcast_(given * (hvd.rank() + 1), 1).tolist() == [2 - 4j]


@pytest.mark.ranks(2)
def test_parameters_are_written_in_place():
    for dtype in (torch.float32, torch.bfloat16):
        parameter = torch.nn.Parameter(mine((2, 3), dtype))
        assert hvd.allreduce_(parameter, op=hvd.Sum) is parameter
        same(parameter.detach(), total((2, 3), dtype))
        assert hvd.broadcast_(parameter, 0) is parameter
        assert parameter.is_leaf and parameter.requires_grad


def test_half_averages_are_divided_before_they_are_summed():
    large = torch.full((3,), 60000.0, dtype=torch.float16)
    for result in (
        hvd.allreduce(large),
        hvd.allreduce_(large.clone()),
        hvd.synchronize(hvd.grouped_allreduce_async([large]))[0],
        hvd.grouped_allreduce([torch.ones(1), large, torch.ones(1, dtype=torch.int32)])[1],
        hvd.reducescatter(torch.cat([large] * hvd.size())),
        hvd.grouped_reducescatter([torch.cat([large] * hvd.size())])[0],
    ):
        assert result.tolist() == [60000.0] * 3


def test_averages():
    for dtype in EXACT:
        given = mine((3,), dtype) * hvd.size()
        same(hvd.allreduce(given), total((3,), dtype))
        same(hvd.allreduce(given, average=True), total((3,), dtype))
        same(hvd.allreduce_(given.clone(), average=False), total((3,), dtype) * hvd.size())


@pytest.mark.ranks(2)
def test_scale_factors_with_every_dtype():
    for dtype in EXACT:
        result = hvd.allreduce(
            torch.full((2,), 4).to(dtype), op=hvd.Sum, prescale_factor=0.5, postscale_factor=3.0
        )
        same(result, torch.full((2,), 6 * hvd.size()).to(dtype))


@pytest.mark.ranks(2)
def test_other_operators_on_every_dtype():
    for dtype in EXACT:
        each = torch.stack([of_rank(rank, (6,), torch.int64) for rank in ranks()])
        given = mine((6,), dtype)
        same(hvd.allreduce(given, op=hvd.Min), each.min(0).values.to(dtype))
        same(hvd.allreduce_(given.clone(), op=hvd.Max), each.max(0).values.to(dtype))
        handle = hvd.allreduce_async(given, op=hvd.Product)
        same(hvd.synchronize(handle), each.prod(0).to(dtype))


def test_groups_of_mixed_dtypes():
    shape = (2, 3)
    given = [mine(shape, dtype) for dtype in EXACT] + [mine(shape, torch.float32).t()]
    sums = [total(shape, dtype) for dtype in EXACT] + [total(shape, torch.float32).t()]
    handle = hvd.grouped_allreduce_async(given, op=hvd.Sum, name="mixed")
    results = [
        hvd.grouped_allreduce(given, op=hvd.Sum, name="mixed.now"),
        hvd.synchronize(handle),
        hvd.grouped_allreduce_([tensor.clone() for tensor in given], op=hvd.Sum),
    ]
    copies = [tensor.clone() for tensor in given]
    delivered = hvd.synchronize(hvd.grouped_allreduce_async_(copies, op=hvd.Sum))
    assert all(one is other for one, other in zip(delivered, copies, strict=True))
    for result in (*results, copies):
        for one, expected in zip(result, sums, strict=True):
            same(one, expected)


@pytest.mark.ranks(2)
def test_moving_every_dtype():
    for dtype in MOVED:
        length = hvd.rank() + 1
        whole = torch.cat([of_rank(r, (r + 1, 2), dtype) for r in ranks()])
        same(hvd.allgather(mine((length, 2), dtype)), whole)
        same(hvd.synchronize(hvd.allgather_async(mine((length, 2), dtype))), whole)

        roots = of_rank(1, (2, 3), dtype)
        same(hvd.broadcast(mine((2, 3), dtype), 1), roots)
        same(hvd.synchronize(hvd.broadcast_async(mine((2, 3), dtype), 1)), roots)
        given = mine((2, 3), dtype)
        assert hvd.synchronize(hvd.broadcast_async_(given, 1)) is given
        same(given, roots)

        rows = torch.cat([of_rank(r, (hvd.size(), 2), dtype)[hvd.rank()][None] for r in ranks()])
        same(hvd.alltoall(mine((hvd.size(), 2), dtype)), rows)
        received, counts = hvd.synchronize(hvd.alltoall_async(mine((hvd.size(), 2), dtype)))
        same(received, rows)
        assert counts.tolist() == [1] * hvd.size()


def test_gathering_groups_and_nothing():
    given = [mine((hvd.rank(), 2), torch.float32), mine((1,), torch.bool)]  # rank 0 has no rows
    expected = [
        torch.cat([of_rank(r, (r, 2), torch.float32) for r in ranks()]),
        torch.cat([of_rank(r, (1,), torch.bool) for r in ranks()]),
    ]
    for results in (
        hvd.grouped_allgather(given),
        hvd.synchronize(hvd.grouped_allgather_async(given)),
    ):
        for one, other in zip(results, expected, strict=True):
            same(one, other)


def test_exchanging_unequal_and_no_rows():
    # Rank r sends as many rows as its number to rank "to", whoever that is; rank 0 sends none.
    splits = [hvd.rank()] * hvd.size()
    for form in (splits, torch.tensor(splits, dtype=torch.int32), torch.tensor(splits)):
        given = mine((hvd.rank() * hvd.size(), 2), torch.bfloat16)
        rows, received = hvd.alltoall(given, form)
        assert received.tolist() == list(ranks())
        assert rows.shape == (sum(ranks()), 2)


def test_scattering_rows_that_do_not_divide():
    rows = 2 * hvd.size() + 1  # the first rank gets the odd one
    begin = 2 * hvd.rank() + min(hvd.rank(), 1)
    end = begin + 2 + (hvd.rank() == 0)
    for dtype in EXACT:
        given, expected = mine((rows, 2), dtype), total((rows, 2), dtype)[begin:end]
        same(hvd.reducescatter(given, op=hvd.Sum), expected)
        same(hvd.synchronize(hvd.reducescatter_async(given, op=hvd.Sum)), expected)
        pair = [given, given.t().contiguous().t()]
        for results in (
            hvd.grouped_reducescatter(pair, op=hvd.Sum),
            hvd.synchronize(hvd.grouped_reducescatter_async(pair, op=hvd.Sum)),
        ):
            for one in results:
                same(one, expected)
    mean = hvd.reducescatter(torch.ones(rows), prescale_factor=2.0, postscale_factor=0.25)
    assert mean.tolist() == [0.5] * (end - begin)


def test_scattering_with_compression():
    given = [torch.full((hvd.size(),), 60000.0), torch.full((hvd.size(), 2), 2.0)]
    for compression in (hvd.Compression.fp16, hvd.Compression.none):
        one, two = hvd.grouped_reducescatter(given, compression=compression)
        torch.testing.assert_close(one, torch.full((1,), 60000.0), rtol=1e-3, atol=0)
        assert two.tolist() == [[2.0, 2.0]]
        result = hvd.reducescatter(given[1], compression=compression, op=hvd.Sum)
        assert result.tolist() == [[2.0 * hvd.size()] * 2]


@pytest.mark.ranks(2)
def test_compressors_of_the_users_own():
    from hvdx.torch.compression import Compressor

    class Negated(Compressor):
        @staticmethod
        def compress(tensor):
            return -tensor.double(), tensor.dtype

        @staticmethod
        def decompress(tensor, ctx):
            return -tensor.to(ctx)

    given = mine((2 * hvd.size(),), torch.float32)
    expected = total((2 * hvd.size(),), torch.float32)
    same(hvd.allreduce(given, op=hvd.Sum, compression=Negated), expected)
    for one in hvd.grouped_allreduce([given, given], op=hvd.Sum, compression=Negated):
        same(one, expected)
    own = slice(2 * hvd.rank(), 2 * hvd.rank() + 2)
    same(hvd.reducescatter(given, op=hvd.Sum, compression=Negated), expected[own])


@pytest.mark.ranks(2)
def test_compressed_groups_of_mixed_dtypes():
    given = [torch.full((3,), 60000.0), torch.ones(2, dtype=torch.int64), torch.ones(1).bfloat16()]
    for one, other in zip(
        hvd.grouped_allreduce(given, compression=hvd.Compression.fp16), given, strict=True
    ):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-3, atol=0)


@pytest.mark.ranks(2)
def test_the_static_use_of_compressors():
    for dtype in (torch.float32, torch.float64):
        packed, context = hvd.Compression.fp16.compress(torch.full((2,), 1.5, dtype=dtype))
        assert packed.dtype == torch.float16
        same(hvd.Compression.fp16.decompress(packed, context), torch.full((2,), 1.5, dtype=dtype))
    for given in (torch.arange(3), torch.arange(3, dtype=torch.uint8)):
        packed, context = hvd.Compression.fp16.compress(given)
        assert packed is given
        same(hvd.Compression.fp16.decompress(packed, context), given)
    given = torch.ones(2)
    packed, context = hvd.Compression.none.compress(given)
    assert packed is given and hvd.Compression.none.decompress(packed, context) is given


def test_sparse_allreduce():
    def sparse(rank: int) -> torch.Tensor:
        # Row 0 is everyone's, another one is the rank's own; rank 0 has no entry at all.
        entries = [[0, rank], [1, 1]] if rank else [[], []]
        values = torch.full((len(entries[0]), 2), float(rank), dtype=torch.bfloat16)
        shape = (hvd.size(), 3, 2)
        return torch.sparse_coo_tensor(entries, values, shape, check_invariants=True)

    dense = sum(sparse(rank).to_dense().float() for rank in ranks())
    for op, expected in ((hvd.Sum, dense), (hvd.Average, dense / hvd.size())):
        handle = hvd.sparse_allreduce_async(sparse(hvd.rank()), name="sparse", op=op)
        result = handle()
        assert result.is_sparse and result.dtype == torch.bfloat16
        torch.testing.assert_close(result.to_dense().float(), expected)
    with pytest.raises(ValueError, match=r"op=hvd\.Average"):
        hvd.sparse_allreduce_async(sparse(0), "sparse", hvd.Max)


def test_handles_of_both_kinds_mix():
    import horovod.torch as plain

    ours = hvd.allreduce_async(torch.ones(2), name="ours", op=hvd.Sum)
    theirs = plain.allreduce_async(torch.ones(2), name="theirs", op=plain.Sum)
    assert isinstance(ours, int)
    plain.poll(ours)
    assert hvd.synchronize(theirs).tolist() == [hvd.size()] * 2
    assert plain.synchronize(ours).tolist() == [hvd.size()] * 2
    assert hvd.synchronize(ours) is None
    assert hvd.synchronize(theirs) is None


@pytest.mark.ranks(2)
def test_a_handle_may_be_dropped():
    for _ in range(3):
        hvd.allreduce_async_(torch.ones(5, 4, dtype=torch.bfloat16).t())
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == hvd.size()


def test_process_sets_of_part_of_the_job(process_set):
    if not process_set.included():
        with pytest.raises(ValueError, match=rf"rank {hvd.rank()}: allreduce of .*not a member"):
            hvd.allreduce_async(torch.ones(1), process_set=process_set)
        return
    members = process_set.ranks
    assert (process_set.size(), process_set.rank()) == (len(members), hvd.rank())
    options = {"process_set": process_set}
    own = torch.full((2,), float(hvd.rank()), dtype=torch.bfloat16)
    assert hvd.allreduce_(own.clone(), op=hvd.Sum, **options).tolist() == [sum(members)] * 2
    half = torch.full((1,), 60000.0, dtype=torch.float16)
    assert hvd.synchronize(hvd.allreduce_async(half, **options)).item() == 60000.0
    whole = hvd.synchronize(hvd.allgather_async(own[:1], **options))
    assert whole.tolist() == members
    assert hvd.broadcast_(own.clone(), members[-1], **options).tolist() == [members[-1]] * 2
    rows, counts = hvd.alltoall(own[:1].repeat(len(members)), [1] * len(members), **options)
    assert (rows.tolist(), counts.tolist()) == (members, [1] * len(members))
    parts = hvd.grouped_reducescatter([torch.ones(len(members))], op=hvd.Sum, **options)
    assert parts[0].tolist() == [len(members)]
    entry = torch.sparse_coo_tensor([[0]], [float(hvd.rank())], (2,), check_invariants=True)
    result = hvd.sparse_allreduce_async(entry, "sparse.part", hvd.Sum, process_set)()
    assert result.to_dense().tolist() == [sum(members), 0]
    hvd.barrier(process_set)


def test_declaring_a_set_again(process_set):
    again = hvd.ProcessSet(process_set.ranks)
    hvd.init(process_sets=[again])
    assert again.process_set_id == process_set.process_set_id
    if again.included():
        total = hvd.allreduce(torch.ones(1), op=hvd.Sum, process_set=again)
        assert total.item() == len(again.ranks)
    with pytest.raises(ValueError, match=r"runs already, without ProcessSet\(\[1\]\)"):
        hvd.init(process_sets=[hvd.ProcessSet([1])])


def test_barriers():
    hvd.barrier()
    hvd.barrier(hvd.global_process_set)
