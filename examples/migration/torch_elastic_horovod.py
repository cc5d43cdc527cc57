"""Elastic training in PyTorch, as written for Horovod.

    horovodrun -np 2 --host-discovery-script ./discover.sh python torch_elastic_horovod.py

Processes may come and go; discover.sh prints the hosts that there are, as in ``localhost:2``. On
one machine add ``--network-interfaces lo``: horovodrun else waits for a second one.
"""

import argparse

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from digits28 import load_data
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--lr", type=float, default=0.05)
parser.add_argument("--batches-per-commit", type=int, default=5)
args = parser.parse_args()

hvd.init()
device = torch.device("cpu")
if torch.cuda.is_available():
    torch.cuda.set_device(hvd.local_rank())
    device = torch.device("cuda")

(images, labels), _ = load_data()
dataset = TensorDataset(torch.tensor(images).flatten(1) / 255, torch.tensor(labels))
sampler = hvd.elastic.ElasticSampler(dataset, shuffle=True)
loader = DataLoader(dataset, batch_size=args.batch_size, sampler=sampler)

model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=args.lr * hvd.size(), momentum=0.9)
optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())

losses = []


@hvd.elastic.run
def train(state):
    """Train from where ``state`` stands; begun anew whenever processes come or go."""
    while state.epoch < args.epochs:
        total = 0.0
        for batch, (data, target) in enumerate(loader):
            data, target = data.to(device), target.to(device)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data), target)
            loss.backward()
            optimizer.step()
            total += loss.item()
            state.sampler.record_batch(batch, args.batch_size)
            if batch % args.batches_per_commit == 0:
                state.commit()
        losses.append(hvd.allreduce(torch.tensor(total / len(loader)), name="loss").item())
        if hvd.rank() == 0:
            print(f"epoch {state.epoch}: loss {losses[-1]:.4f} on {hvd.size()} processes")
        state.epoch += 1
        state.sampler.set_epoch(state.epoch)
        state.commit()


def on_state_reset():
    """Fit the learning rate to the new number of processes."""
    for group in optimizer.param_groups:
        group["lr"] = args.lr * hvd.size()


state = hvd.elastic.TorchState(model=model, optimizer=optimizer, epoch=0, sampler=sampler)
state.register_reset_callbacks([on_state_reset])
train(state)
