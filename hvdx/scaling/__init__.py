"""Predict training on ranks that are not there: step time, efficiency and memory of large jobs.

    outline   what a method sends between any number of ranks: run on tensors without values
    profile   what a model costs on one rank, measured or given, kept as JSON
    cluster   hosts and links -> what each kind of collective takes (:class:`hvdx.link.Link`)
    ways      how ranks are kept in step, as text: ``powersgd=4``, ``hierarchical``, ``stages=4``
    predict   profile + cluster + way -> prediction

The exchange of gradients is predicted as ``Compression.auto`` predicts it
(:class:`hvdx.compression.plans.Model`), pipelines as they are planned
(:mod:`hvdx.pipeline.simulator`); what is new here is only what a network of many ranks makes of a
measured one. Framework-free.
"""
