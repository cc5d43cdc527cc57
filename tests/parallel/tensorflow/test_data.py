"""``hvd.data.shard`` in every rank."""

from __future__ import annotations

import pytest
import tensorflow as tf

import hvdx


def seen_by_all(batches):
    return hvdx.allgather_object([batch.numpy().tolist() for batch in batches])


@pytest.mark.parametrize(
    ("extra", "shuffle"),
    [
        pytest.param(0, False, marks=pytest.mark.ranks(2)),
        pytest.param(0, 5, marks=pytest.mark.ranks(2)),
        (1, True),
        (-1, 5),
    ],
)
def test_every_element_once_in_equally_many_steps(hvd, extra, shuffle):
    tf.random.set_seed(hvd.rank())  # as scripts do for dropout; orders must not care
    elements = 8 * hvd.size() + extra
    batches = hvd.data.shard(tf.data.Dataset.range(elements), 4, shuffle=shuffle, seed=3)
    passes = []
    for _ in range(2):
        ranks = seen_by_all(batches)
        assert {len(own) for own in ranks} == {int(batches.cardinality())}
        assert sorted(i for own in ranks for batch in own for i in batch) == list(range(elements))
        assert max(len(batch) for own in ranks for batch in own) <= 4
        passes.append(ranks)
    assert (passes[0] != passes[1]) == bool(shuffle)
    if shuffle:
        batches.epoch.assign(0)
        assert seen_by_all(batches) == passes[0]


@pytest.mark.ranks(2)
def test_only_own_elements_are_transformed(hvd):
    calls = tf.Variable(0)

    def count(element):
        calls.assign_add(1)
        return -element

    batches = hvd.data.shard(
        tf.data.Dataset.range(4 * hvd.size()), 2, transform=lambda dataset: dataset.map(count)
    )
    ranks = seen_by_all(batches)
    assert sorted(-i for own in ranks for batch in own for i in batch) == list(
        range(4 * hvd.size())
    )
    assert calls.numpy() == 4


def test_weights_make_the_last_step_right(hvd):
    elements = 4 * hvd.size() + 1
    x = tf.data.Dataset.range(elements)
    batches = hvd.data.shard(tf.data.Dataset.zip((x, x)), 4, shuffle=False, weights=True)
    means = [float(tf.reduce_sum(tf.cast(x, tf.float32) * w) / len(x)) for x, _, w in batches]
    sizes = hvdx.data.step_sizes(elements, hvd.size(), 4)
    assert sum(sizes) == elements
    start = 0
    for mean, size in zip(means, sizes, strict=True):
        assert hvdx.allreduce(mean) == pytest.approx(sum(range(start, start + size)) / size)
        start += size


@pytest.mark.ranks(2)
def test_endless_and_uncounted_datasets(hvd):
    endless = hvd.data.shard(tf.data.Dataset.range(6 * hvd.size()).repeat(), 2, shuffle=False)
    first = hvdx.allgather_object(next(iter(endless)).numpy().tolist())
    assert sorted(i for own in first for i in own) == list(range(2 * hvd.size()))
    with pytest.raises(ValueError, match="assert_cardinality"):
        hvd.data.shard(tf.data.Dataset.range(9).filter(lambda i: i > 2), 2)
    with pytest.raises(ValueError, match="too few"):
        hvd.data.shard(tf.data.Dataset.range(hvd.size() - 1), 2)
    short = hvd.data.shard(tf.data.Dataset.range(2 * hvd.size() + 1), 2, drop_last=True)
    assert len(list(short)) == 1
