"""Loss against bytes and against time, of handwritten digits with Keras 3, method by method.

    hvdx run -np 2 -- python examples/compression_sweep_keras.py --methods none int8 onebit topk

prints a table and draws a picture (PNG). Inside one machine bytes cost next to nothing, so that
time tells what compressing costs; how much it saves shows a slow link between hosts, or

    python benchmarks/rig.py --rate 2 -- python examples/compression_sweep_keras.py

as root, at 2 Mbit/s: the net is small. examples/compression_sweep_torch.py is the same in PyTorch.
KERAS_BACKEND=torch runs this one on PyTorch too.
"""

from __future__ import annotations

import argparse
import time

from compression_sweep import Curve, megabytes, method, options, show
from digits import load_shard
from digits_keras import make_model  # sets the backend: before keras

# isort: split
import keras

import hvdx as hvd


def train(name: str, told: argparse.Namespace) -> Curve:
    """Train from the same start as all methods do, and test after each epoch."""
    keras.utils.set_random_seed(told.seed + hvd.rank())  # dropout differs between ranks
    (images, labels), test = load_shard(hvd.rank(), hvd.size(), told.seed)

    compressor, model = method(name), make_model()
    momentum = 0.0 if compressor.owns_momentum else 0.9
    optimizer = keras.optimizers.SGD(told.lr, momentum)
    optimizer = hvd.DistributedOptimizer(optimizer, compression=compressor)
    model.compile(
        optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    hvd.broadcast_parameters(model)

    shapes = {value.path: tuple(value.shape) for value in model.trainable_variables}
    steps, elapsed, curve = 0, 0.0, Curve(name, [], [], [], [])
    for epoch in range(told.epochs):
        start = time.perf_counter()
        model.fit(images, labels, batch_size=told.batch_size, verbose=0)
        steps += -(-len(images) // told.batch_size)
        if epoch > 0:  # in the first, ranks meet and graphs are traced
            elapsed += time.perf_counter() - start
        tested = model.evaluate(*test, batch_size=len(test[0]), verbose=0, return_dict=True)
        curve.megabytes.append(megabytes(compressor, shapes, hvd.size(), steps))
        curve.seconds.append(elapsed)
        curve.losses.append(tested["loss"])
        curve.accuracies.append(tested["accuracy"])
    return curve


def main() -> None:
    """Train with each method, show how it went."""
    told = options(__doc__, "keras").parse_args()
    hvd.init()
    curves = [train(name, told) for name in told.methods]
    show(curves, f"digits with Keras on {hvd.size()} ranks", told.png)


if __name__ == "__main__":
    main()
