"""A search for the best learning rate with PyTorch: several trainings at once, in one job.

    hvdx run -np 4 -- python examples/trials_torch.py --groups 2 --rates 0.3 0.1 0.03 0.01

cuts four ranks into two groups. Each trains a net of its own on two ranks, with one learning rate
after the other, while the other group tries the rest. examples/trials_keras.py is the same in
Keras 3.
"""

from __future__ import annotations

import argparse

import torch
from digits import load_shard
from digits_torch import Net
from torch import nn
from trials import options, recorder, search

import hvdx as hvd


def train(rate: float, told: argparse.Namespace) -> tuple[float, float]:
    """Train with one learning rate on the ranks of this group; return test loss and accuracy."""
    group = told.groups.ranks
    train, test = load_shard(group.index(hvd.rank()), len(group), told.seed)
    images, labels = (torch.from_numpy(part) for part in train)
    images = images.permute(0, 3, 1, 2)

    torch.manual_seed(told.seed)  # all trials begin alike
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(optimizer, model, process_set=told.groups.mine)
    hvd.broadcast_parameters(model, group[0], process_set=told.groups.mine)

    shuffle = torch.Generator().manual_seed(told.seed)
    with recorder(rate, optimizer, told) as metrics:
        for _ in range(told.epochs):
            for batch in torch.randperm(len(images), generator=shuffle).split(told.batch_size):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
                loss.backward()
                optimizer.step()
                metrics.step(len(batch), loss=loss)

    model.eval()
    test_images, test_labels = (torch.from_numpy(part) for part in test)
    with torch.no_grad():
        logits = model(test_images.permute(0, 3, 1, 2))
    loss = nn.functional.cross_entropy(logits, test_labels)
    return loss.item(), (logits.argmax(1) == test_labels).float().mean().item()


def main() -> None:
    """Try all rates."""
    told = options(__doc__).parse_args()
    hvd.init(process_sets=told.groups)
    torch.set_num_threads(1)  # the processes share the cores
    search(train, told)


if __name__ == "__main__":
    main()
