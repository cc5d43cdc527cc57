"""Share a ``tf.data.Dataset`` between ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from hvdx import data
from hvdx.data import Place

_BUFFER = 1 << 16  # elements shuffled with each other, where the user does not say


def shard(
    dataset: tf.data.Dataset,
    batch_size: int,
    *,
    shuffle: bool | int = True,
    seed: int = 0,
    transform: Callable[[Any], Any] | None = None,
    weights: bool = False,
    drop_last: bool = False,
    process_set: Any = None,
) -> tf.data.Dataset:
    """Return this rank's batches: every element exactly once, the same number of steps everywhere.

    Elements are shuffled, equally on all ranks and anew in every epoch, then dealt out, then
    transformed, then batched. Where they do not divide, the last batches are smaller; the last
    step's batches of two ranks may differ by one element. The result's attribute ``epoch`` is
    a variable with the number of the next epoch; assign to it when training resumes.

    All ranks must iterate equally often: each iteration draws the next epoch's order.

    Args:
        dataset: of single elements, not batches, in an order equal on all ranks.
        batch_size: per rank.
        shuffle: False, or how many elements are shuffled with each other; True means 65536.
            They are held in memory, so shuffle file names or records, and decode later.
        seed: of the orders; equal on all ranks. ``tf.random.set_seed`` does not matter.
        transform: what is done with this rank's elements only, such as
            ``lambda dataset: dataset.map(decode, tf.data.AUTOTUNE)``; it must keep their number.
        weights: make elements (x, y) batches (x, y, sample weights), with which the mean of the
            ranks' gradients is that of one process in the last step too.
        drop_last: leave out the elements that do not fill a batch on every rank.
        process_set: the ranks that share the data; all by default.

    Raises:
        ValueError: the number of elements is not known, or smaller than that of ranks.

    Example:
        >>> batches = hvd.data.shard(tf.data.Dataset.from_tensor_slices((x, y)), 32)
        >>> model.fit(batches, epochs=5, callbacks=[...])
    """
    place = Place.of(process_set)
    count = int(dataset.cardinality())
    sizes = None if count == tf.data.INFINITE_CARDINALITY else _sizes(
        count, place, batch_size, drop_last
    )  # fmt: skip
    if shuffle:
        dataset, epoch = _shuffled(dataset, _BUFFER if shuffle is True else shuffle, seed)
    if sizes is not None and sum(sizes) < count:
        dataset = dataset.take(sum(sizes))
    own = dataset.shard(place.ranks, place.rank)
    if transform is not None:
        own = transform(own)
    if sizes is None:
        batches = own.batch(batch_size, drop_remainder=True)
    else:
        batches = _batched(own, sizes, place, batch_size)
        if weights:
            batches = _weighted(batches, sizes, place)
    if shuffle:
        batches.epoch = epoch
    return batches


def _sizes(count: int, place: Place, batch_size: int, drop_last: bool) -> list[int]:
    if count == tf.data.UNKNOWN_CARDINALITY:
        raise ValueError(
            "the number of the dataset's elements is not known, so that ranks cannot agree on "
            "their steps: dataset.apply(tf.data.experimental.assert_cardinality(n)), .repeat() it "
            "for ever, or give shard() what comes before filter, flat_map or interleave"
        )
    if count < place.ranks:
        raise ValueError(f"{count} elements are too few for {place.ranks} ranks")
    return data.step_sizes(count, place.ranks, batch_size, drop_last)


def _shuffled(dataset: Any, buffer: int, seed: int) -> tuple[Any, Any]:
    """Shuffle by seed and epoch; the epoch is counted in a variable as iterations begin."""
    with tf.device("CPU:0"):
        epoch = tf.Variable(0, dtype=tf.int64, trainable=False)

    def whole(_: Any) -> Any:
        # This function's graph has a seed of its own. Else that of the process would count,
        # which scripts make differ between ranks, for the sake of dropout.
        tf.compat.v1.get_default_graph().seed = seed % (2**31 - 2) + 1  # 0 would mean none
        now = epoch.assign_add(1) - 1
        return dataset.shuffle(buffer, seed=now, reshuffle_each_iteration=False)

    shuffled = tf.data.Dataset.from_tensors(0).flat_map(whole)
    return shuffled.apply(tf.data.experimental.assert_cardinality(dataset.cardinality())), epoch


def _batched(own: Any, sizes: list[int], place: Place, batch_size: int) -> Any:
    """Batch by the plan, in which the last two steps may be irregular."""
    mine = [len(range(place.rank, size, place.ranks)) for size in sizes]
    plain = own.batch(batch_size)
    regular = all(size == batch_size for size in mine[:-1]) and mine[-1] <= batch_size
    batches = plain if regular else plain.rebatch(np.array(mine, np.int64))
    return batches.apply(tf.data.experimental.assert_cardinality(len(sizes)))


def _weighted(batches: Any, sizes: list[int], place: Place) -> Any:
    if not (isinstance(batches.element_spec, tuple) and len(batches.element_spec) == 2):
        raise ValueError(f"weights=True needs elements (x, y), not {batches.element_spec}")
    factors = [place.ranks * len(range(place.rank, size, place.ranks)) / size for size in sizes]

    def add(batch: Any, factor: Any) -> Any:
        x, y = batch
        return x, y, tf.fill(tf.shape(tf.nest.flatten(y)[0])[:1], factor)

    steps = tf.data.Dataset.from_tensor_slices(np.array(factors, np.float32))
    return tf.data.Dataset.zip((batches, steps)).map(add)
