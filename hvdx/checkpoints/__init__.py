"""Checkpoints of training: whole or not there, checked, and on any number of ranks.

tree       state as JSON and tensors; no pickles
files      one file: safetensors, atomic, with checksums
folder     many of them: manifests, damage, the last few kept
parts      how models, optimizers, pipelines and the like tell their state
saver      ``hvd.Checkpoints``: all ranks together, in the background
"""
