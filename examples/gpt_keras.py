"""A small GPT that reads English, byte by byte, with Keras 3, on as many processes as you like.

    hvdx run -np 2 -- python examples/gpt_keras.py --generate
    hvdx run -np 2 -- python examples/gpt_keras.py --compression powersgd
    hvdx run -np 2 -- python examples/gpt_keras.py --stages 2
    hvdx run -np 4 -- python examples/gpt_keras.py --stages 2 --replicas 2
    hvdx run -np 2 -- python examples/gpt_keras.py --checkpoint saved  # kill it, start it again

On TensorFlow; examples/gpt.py is the same in PyTorch, and says more.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow is talkative
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import keras
import tensorflow as tf
from compression_sweep import method
from gpt_shared import SYMBOLS, Text, options, place, rate, recorded, share, tokens, written
from keras import layers

import hvdx as hvd


@keras.saving.register_keras_serializable("gpt")
class Places(layers.Layer):
    """Adds to each byte's vector one that says where it stands."""

    def build(self, shape: tuple[int, ...]) -> None:
        """Make the weight, (length, width)."""
        self.places = self.add_weight(shape=shape[1:], initializer=normal(), name="places")

    def call(self, x: Any) -> Any:
        """Return what becomes of x, (n, length, width)."""
        return x + self.places


def normal() -> Any:
    """Return an initializer for weights of matrices."""
    return keras.initializers.RandomNormal(stddev=0.02)


def make_model(length: int, width: int, depth: int, heads: int) -> keras.Model:
    """Return a causal transformer whose head shares the weight of its embedding."""
    text = keras.Input((length,), dtype="int64", name="text")
    symbols = layers.ReversibleEmbedding(
        SYMBOLS, width, embeddings_initializer=normal(), name="symbols"
    )
    x = Places(name="places")(symbols(text))
    for _ in range(depth):
        y = layers.LayerNormalization(epsilon=1e-5)(x)
        look = layers.MultiHeadAttention(heads, width // heads, kernel_initializer=normal())
        x = x + look(y, y, use_causal_mask=True)
        y = layers.LayerNormalization(epsilon=1e-5)(x)
        y = layers.Dense(4 * width, activation="gelu", kernel_initializer=normal())(y)
        x = x + layers.Dense(width, kernel_initializer=normal())(y)
    x = layers.LayerNormalization(epsilon=1e-5)(x)
    return keras.Model(text, symbols(x, reverse=True))


class Batches(keras.utils.PyDataset):
    """The batches of an epoch, from where training has got to: right after a restart, too.

    Args:
        text: to read.
        told: the options.
        rows: of a batch that this rank trains on.
        optimizer: that counts its steps.
    """

    def __init__(self, text: Text, told: argparse.Namespace, rows: slice, optimizer: Any) -> None:
        super().__init__()
        self._text, self._told, self._rows, self._optimizer = text, told, rows, optimizer
        self._first = 0

    def on_epoch_begin(self) -> None:
        """Look how many steps have been trained."""
        self._first = int(self._optimizer.iterations)

    def __len__(self) -> int:
        return int(self._told.every)

    def __getitem__(self, index: int) -> Any:
        """Return this rank's rows of a batch."""
        x, y = self._text.batch(self._first + index)
        return x[self._rows], y[self._rows]


class Save(keras.callbacks.Callback):
    """Saves a pipeline after each epoch, on all ranks."""

    def __init__(self, pipe: Any, path: Any) -> None:
        super().__init__()
        self._pipe, self._path = pipe, path

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Save."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._pipe.save(self._path)


def data_parallel(model: Any, text: Text, told: argparse.Namespace) -> Any:
    """Train the whole model on each rank, by shares of the batches; return what computes logits."""
    optimizer = keras.optimizers.AdamW(told.lr)
    optimizer = hvd.DistributedOptimizer(
        optimizer,
        compression=method(told.compression),
        sparse_as_dense=True,  # the head gives each row of the shared weight a gradient
    )
    model.compile(optimizer, loss=loss())
    callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0)]
    if told.checkpoint:
        callbacks.append(hvd.callbacks.CheckpointCallback(told.checkpoint / "whole"))
    model.fit(
        Batches(text, told, share(told), optimizer),
        epochs=told.steps // told.every,
        shuffle=False,
        verbose=0,
        validation_data=text.unseen(),
        callbacks=[*callbacks, *shared_callbacks(told)],
    )
    return model.predict_on_batch


def in_stages(model: Any, text: Text, told: argparse.Namespace) -> Any:
    """Train a part of the model on each rank, by whole batches; return what computes logits."""
    pipe = hvd.Pipeline(
        model,
        text.batch(0)[0],
        loss=loss(),
        optimizer=keras.optimizers.AdamW(told.lr),
        stages=told.stages,
        place=place(told),
        compression=method(told.compression) if told.replicas > 1 else None,
        schedule=told.schedule,
        micro_batches=told.micro_batches,
    )
    callbacks = shared_callbacks(told)
    if told.checkpoint:
        saved = told.checkpoint / "stages.safetensors"
        if saved.exists():
            pipe.load(saved)
        callbacks.append(Save(pipe, saved))
    pipe.fit(
        Batches(text, told, slice(None), pipe.optimizer),
        epochs=told.steps // told.every,
        initial_epoch=pipe.steps // told.every,
        verbose=0,
        validation_data=text.unseen(),
        callbacks=callbacks,
    )
    if told.timeline:
        pipe.timeline(told.timeline)
    return pipe


def loss() -> Any:
    """Return the mean over all bytes, in nats."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def shared_callbacks(told: argparse.Namespace) -> list[Any]:
    """Return those of both ways: learning rates and metrics."""
    rates = hvd.callbacks.LearningRateScheduleCallback(
        told.lr,
        lambda epoch: rate(round(epoch * told.every), told) / told.lr,
        staircase=False,
        momentum_correction=False,
        steps_per_epoch=told.every,
    )
    metrics = hvd.callbacks.MetricsCallback(told.metrics, batch_size=tokens(told), **recorded(told))
    return [rates, metrics]


def main() -> None:
    """Train, and let the model write."""
    told = options(__doc__)
    tf.config.threading.set_intra_op_parallelism_threads(1)  # the processes share the cores
    hvd.init()
    keras.utils.set_random_seed(told.seed)
    model, text = make_model(told.length, told.width, told.depth, told.heads), Text(told)
    logits = (in_stages if told.stages else data_parallel)(model, text, told)
    if told.generate:
        said = written(logits, told)
        if hvd.rank() == 0:
            print(f"\n{said}", flush=True)


if __name__ == "__main__":
    main()
