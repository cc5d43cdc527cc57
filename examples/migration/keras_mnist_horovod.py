"""MNIST-style training with Keras 3, as written for Horovod.

    horovodrun -np 2 python keras_mnist_horovod.py

Broadcast, averaged metrics, warm-up, and checkpoints from one process.
"""

import argparse
import os

import horovod.keras as hvd
import keras
from digits28 import load_data
from keras import layers

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--checkpoints", default="checkpoints")
args = parser.parse_args()

hvd.init()

(images, labels), _ = load_data()
mine = slice(hvd.rank(), len(images) // hvd.size() * hvd.size(), hvd.size())
images = (images[mine, ..., None] / 255.0).astype("float32")
labels = labels[mine]

model = keras.Sequential(
    [
        keras.Input((28, 28, 1)),
        layers.Conv2D(16, 3, activation="relu"),
        layers.MaxPooling2D(),
        layers.Conv2D(32, 3, activation="relu"),
        layers.MaxPooling2D(),
        layers.Flatten(),
        layers.Dense(64, activation="relu"),
        layers.Dense(10, activation="softmax"),
    ]
)

# Scale the learning rate by the number of processes.
scaled_lr = 0.001 * hvd.size()
optimizer = keras.optimizers.Adam(scaled_lr)
optimizer = hvd.DistributedOptimizer(optimizer)

model.compile(
    loss="sparse_categorical_crossentropy",
    optimizer=optimizer,
    metrics=["accuracy"],
)

callbacks = [
    # Start all processes from the same weights.
    hvd.callbacks.BroadcastGlobalVariablesCallback(0),
    # Average metrics over the processes at the end of every epoch.
    hvd.callbacks.MetricAverageCallback(),
    # Warm up from lr to lr * size.
    hvd.callbacks.LearningRateWarmupCallback(initial_lr=scaled_lr, warmup_epochs=2, verbose=0),
]

# Only one process may write the checkpoints.
if hvd.rank() == 0:
    path = os.path.join(args.checkpoints, "checkpoint-{epoch}.keras")
    callbacks.append(keras.callbacks.ModelCheckpoint(path))

history = model.fit(
    images,
    labels,
    batch_size=args.batch_size,
    epochs=args.epochs,
    callbacks=callbacks,
    verbose=2 if hvd.rank() == 0 else 0,
)
losses = history.history["loss"]
