"""A training loop of one's own in TensorFlow 2, with hvdx.

    hvdx run -np 2 -- python tensorflow_tape.py

Gradients are averaged by the tape; Keras provides the layers and the optimizer.
"""

import argparse

import hvdx.tensorflow as hvd
import keras
import tensorflow as tf
from digits28 import load_data

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=200, help="of all processes together")
parser.add_argument("--batch-size", type=int, default=64)
args = parser.parse_args()

hvd.init()

# Pin GPU to be used to process local rank (one GPU per process)
gpus = tf.config.list_physical_devices("GPU")
for gpu in gpus:
    tf.config.experimental.set_memory_growth(gpu, True)
if gpus:
    tf.config.set_visible_devices(gpus[hvd.local_rank()], "GPU")

(images, labels), _ = load_data()
images = (images[..., None] / 255.0).astype("float32")
dataset = tf.data.Dataset.from_tensor_slices((images, labels))
dataset = hvd.data.shard(dataset, args.batch_size).repeat()

model = keras.Sequential(
    [
        keras.Input((28, 28, 1)),
        keras.layers.Conv2D(16, 3, activation="relu"),
        keras.layers.MaxPooling2D(),
        keras.layers.Conv2D(32, 3, activation="relu"),
        keras.layers.MaxPooling2D(),
        keras.layers.Flatten(),
        keras.layers.Dense(64, activation="relu"),
        keras.layers.Dense(10, activation="softmax"),
    ]
)
loss = keras.losses.SparseCategoricalCrossentropy()

# Scale the learning rate by the number of processes.
opt = keras.optimizers.Adam(0.001 * hvd.size())

hvd.broadcast_parameters(model)


@tf.function
def training_step(images, labels):
    """Make one step."""
    with tf.GradientTape() as tape:
        loss_value = loss(labels, model(images, training=True))

    # Average the gradients over the processes.
    tape = hvd.DistributedGradientTape(tape)
    grads = tape.gradient(loss_value, model.trainable_variables)
    opt.apply_gradients(zip(grads, model.trainable_variables))

    return loss_value


losses = []
for batch, (x, y) in enumerate(dataset.take(args.steps // hvd.size())):
    loss_value = training_step(x, y)
    if batch % 10 == 0:
        losses.append(float(hvd.allreduce(loss_value, name="loss")))
        if hvd.rank() == 0:
            print(f"step {batch}: loss {losses[-1]:.4f}")
