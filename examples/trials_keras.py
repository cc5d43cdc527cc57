"""A search for the best learning rate with Keras 3: several trainings at once, in one job.

    hvdx run -np 4 -- python examples/trials_keras.py --groups 2 --rates 0.3 0.1 0.03 0.01

examples/trials_torch.py is the same in PyTorch, and says more. KERAS_BACKEND=torch runs this one on
PyTorch too.
"""

from __future__ import annotations

import argparse

from digits import load_shard
from digits_keras import make_model  # sets the backend: before keras
from trials import options, recorder, search

# isort: split
import keras

import hvdx as hvd


class Record(keras.callbacks.Callback):
    """Counts steps for what records the trial."""

    def __init__(self, metrics: hvd.Metrics, batch_size: int) -> None:
        super().__init__()
        self._metrics, self._batch_size = metrics, batch_size

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Count one."""
        self._metrics.step(self._batch_size, loss=(logs or {})["loss"])


def train(rate: float, told: argparse.Namespace) -> tuple[float, float]:
    """Train with one learning rate on the ranks of this group; return test loss and accuracy."""
    group = told.groups.ranks
    (images, labels), test = load_shard(group.index(hvd.rank()), len(group), told.seed)
    keras.utils.set_random_seed(told.seed)  # all trials begin alike
    model = make_model()
    optimizer = keras.optimizers.SGD(rate, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(optimizer, process_set=told.groups.mine)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    hvd.broadcast_parameters(model, group[0], process_set=told.groups.mine)
    with recorder(rate, optimizer, told) as metrics:
        model.fit(
            images,
            labels,
            batch_size=told.batch_size,
            epochs=told.epochs,
            verbose=0,
            callbacks=[Record(metrics, told.batch_size)],
        )
    found = model.evaluate(*test, batch_size=len(test[0]), verbose=0, return_dict=True)
    return found["loss"], found["accuracy"]


def main() -> None:
    """Try all rates."""
    told = options(__doc__).parse_args()
    hvd.init(process_sets=told.groups)
    search(train, told)


if __name__ == "__main__":
    main()
