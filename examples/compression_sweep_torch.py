"""Loss against bytes and against time, of handwritten digits with PyTorch, method by method.

    hvdx run -np 2 -- python examples/compression_sweep_torch.py --methods none int8 onebit topk

prints a table and draws a picture (PNG). Inside one machine bytes cost next to nothing, so that
time tells what compressing costs; how much it saves shows a slow link between hosts, or

    python benchmarks/rig.py --rate 2 -- python examples/compression_sweep_torch.py

as root, at 2 Mbit/s: the net is small. examples/compression_sweep_keras.py is the same in Keras 3.
"""

from __future__ import annotations

import argparse
import time

import torch
from compression_sweep import Curve, megabytes, method, options, show
from digits import load_shard
from digits_torch import Net
from torch import nn

import hvdx as hvd


def train(name: str, told: argparse.Namespace) -> Curve:
    """Train from the same start as all methods do, and test after each epoch."""
    torch.manual_seed(told.seed + hvd.rank())  # dropout differs between ranks
    (images, labels), test = load_shard(hvd.rank(), hvd.size(), told.seed)
    images, labels = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)
    test_images, test_labels = torch.from_numpy(test[0]).permute(0, 3, 1, 2), torch.tensor(test[1])

    compressor, model = method(name), Net()
    momentum = 0.0 if compressor.owns_momentum else 0.9
    optimizer = torch.optim.SGD(model.parameters(), told.lr, momentum)
    optimizer = hvd.DistributedOptimizer(optimizer, model, compression=compressor)
    hvd.broadcast_parameters(model)

    shapes = {key: tuple(value.shape) for key, value in model.named_parameters()}
    shuffle = torch.Generator().manual_seed(told.seed)
    steps, elapsed, curve = 0, 0.0, Curve(name, [], [], [], [])
    for epoch in range(told.epochs):
        model.train()
        start = time.perf_counter()
        for batch in torch.randperm(len(images), generator=shuffle).split(told.batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            steps += 1
        if epoch > 0:  # in the first, ranks meet and plan buckets
            elapsed += time.perf_counter() - start
        model.eval()
        with torch.no_grad():
            logits = model(test_images)
            loss = nn.functional.cross_entropy(logits, test_labels).item()
            accuracy = (logits.argmax(1) == test_labels).float().mean().item()
        curve.megabytes.append(megabytes(compressor, shapes, hvd.size(), steps))
        curve.seconds.append(elapsed)
        curve.losses.append(loss)
        curve.accuracies.append(accuracy)
    return curve


def main() -> None:
    """Train with each method, show how it went."""
    told = options(__doc__, "torch").parse_args()
    hvd.init()
    torch.set_num_threads(1)
    curves = [train(name, told) for name in told.methods]
    show(curves, f"digits with PyTorch on {hvd.size()} ranks", told.png)


if __name__ == "__main__":
    main()
