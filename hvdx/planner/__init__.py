"""Which mix of replicas, stages, micro-batches, schedule and compression is quickest, and fits.

    facts    what is known: of the model's units, of the network, of the ranks
    clock    when tasks end that wait for each other, on ranks that may share cores
    costs    what a step takes, and what each rank keeps, under one candidate
    search   all candidates, the quickest first
    trim     what real steps add to times that were measured unit by unit
    table    all of that in words
    auto     measure in a running job, try the best few, agree

All but the last are pure functions of plain data: no framework, no clock, no network.
"""
