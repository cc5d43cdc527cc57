"""Mixed precision with loss scaling and clipping in PyTorch, with hvdx.

    hvdx run -np 2 -- python torch_amp.py

On a CPU in bfloat16, on GPUs in float16.
"""

import argparse

import hvdx.torch as hvd
import torch
import torch.nn.functional as F
from digits28 import load_data
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--batch-size", type=int, default=64)
args = parser.parse_args()

hvd.init()
device, dtype = "cpu", torch.bfloat16
if torch.cuda.is_available():
    torch.cuda.set_device(hvd.local_rank())
    device, dtype = "cuda", torch.float16

(images, labels), _ = load_data()
dataset = TensorDataset(torch.tensor(images).flatten(1) / 255, torch.tensor(labels))
sampler = hvd.DistributedSampler(dataset)
loader = DataLoader(dataset, batch_size=args.batch_size, sampler=sampler)

model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05 * hvd.size(), momentum=0.9)
optimizer = hvd.DistributedOptimizer(optimizer, model)
hvd.broadcast_parameters(model)

scaler = torch.amp.GradScaler(device)

losses = []
for epoch in range(1, args.epochs + 1):
    sampler.set_epoch(epoch)
    total = 0.0
    for data, target in loader:
        data, target = data.to(device), target.to(device)
        optimizer.zero_grad()
        with torch.autocast(device, dtype=dtype):
            loss = F.cross_entropy(model(data), target)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        total += loss.item()
    losses.append(hvd.allreduce(torch.tensor(total / len(loader)), name="loss").item())
    if hvd.rank() == 0:
        print(f"epoch {epoch}: loss {losses[-1]:.4f}")
