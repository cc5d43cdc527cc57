"""Handwritten digits with Keras 3, on as many processes as you like.

    hvdx run -np 2 -- python examples/digits_keras.py

The convolutional net of the classic MNIST example, for 8x8 images. What makes the training
distributed is marked "hvdx"; examples/digits_torch.py is the same in PyTorch. KERAS_BACKEND=torch
runs this one on PyTorch too.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow is talkative
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes share the cores

import keras
from digits import load_shard
from keras import layers

import hvdx as hvd


def make_model() -> keras.Model:
    """Return the classic network of two convolutions, for images of 8 by 8 pixels."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(10, 5, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(20, 5, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(50, activation="relu"),
            layers.Dropout(0.25),
            layers.Dense(10),
        ]
    )


def main() -> None:
    """Train, report and compare the replicas."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=32, help="per process")
    parser.add_argument("--lr", type=float, default=4e-3, help="for all processes together")
    parser.add_argument("--seed", type=int, default=0)
    told = parser.parse_args()

    hvd.init()  # hvdx
    (x_train, y_train), (x_test, y_test) = load_shard(hvd.rank(), hvd.size(), told.seed)  # hvdx
    keras.utils.set_random_seed(told.seed + hvd.rank())  # dropout differs between ranks
    model = make_model()
    optimizer = keras.optimizers.Adam(told.lr)
    optimizer = hvd.DistributedOptimizer(optimizer)  # hvdx
    model.compile(
        optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(
        x_train,
        y_train,
        batch_size=told.batch_size,
        epochs=told.epochs,
        verbose=0,
        callbacks=[  # hvdx
            hvd.callbacks.BroadcastGlobalVariablesCallback(root_rank=0),
            hvd.callbacks.MetricAverageCallback(),
            hvd.callbacks.ProgressCallback(),
        ],
    )
    accuracy = model.evaluate(x_test, y_test, verbose=0, return_dict=True)["accuracy"]
    hvd.TrainingReport(optimizer).final(accuracy, model)  # hvdx


if __name__ == "__main__":
    main()
