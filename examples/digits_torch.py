"""Handwritten digits with PyTorch, on as many processes as you like.

    hvdx run -np 2 -- python examples/digits_torch.py

The convolutional net of the classic MNIST example, for 8x8 images. What makes the training
distributed is marked "hvdx"; examples/digits_keras.py is the same in Keras 3.
"""

from __future__ import annotations

import argparse

import torch
from digits import load_shard
from torch import nn

import hvdx as hvd


class Net(nn.Module):
    """Two convolutions with pooling, two linear layers with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 10, kernel_size=5, padding=2),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(10, 20, kernel_size=5, padding=2),
            nn.Dropout2d(0.1),
            nn.MaxPool2d(2),
            nn.ReLU(),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(80, 50), nn.ReLU(), nn.Dropout(0.25), nn.Linear(50, 10)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits, (n, 10), of images, (n, 1, 8, 8)."""
        return self.classifier(self.features(images))


def main() -> None:
    """Train, and tell the test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=32, help="per process")
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--seed", type=int, default=0)
    told = parser.parse_args()

    hvd.init()  # hvdx; of several GPUs each process takes its own
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    torch.manual_seed(told.seed + hvd.rank())  # dropout differs between ranks
    train, test = load_shard(hvd.rank(), hvd.size(), told.seed)  # hvdx
    images, labels = (torch.from_numpy(part).to(device) for part in train)
    images = images.permute(0, 3, 1, 2)

    model = Net().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=told.lr)
    optimizer = hvd.DistributedOptimizer(optimizer, model)  # hvdx
    hvd.broadcast_parameters(model)  # hvdx
    report = hvd.TrainingReport(optimizer, told.epochs)  # hvdx

    shuffle = torch.Generator().manual_seed(told.seed)
    for _ in range(told.epochs):
        model.train()
        for batch in torch.randperm(len(images), generator=shuffle).split(told.batch_size):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            report.batch(len(batch), loss)
        report.epoch()

    model.eval()
    test_images, test_labels = (torch.from_numpy(part).to(device) for part in test)
    with torch.no_grad():
        guesses = model(test_images.permute(0, 3, 1, 2)).argmax(1)
    report.final((guesses == test_labels).float().mean().item(), model)


if __name__ == "__main__":
    main()
