"""Feed: which samples a step takes, on which rank, and how they are packed; teacher rows into reused buffers.

Dataset (samples, teachers) -> order(seed, epoch) -> steps(batch_tokens) -> deal(ranks x accumulation) -> pack

order    pure functions: shuffle, cut, deal
dataset  samples of one or more plans, and their teachers' rows from whatever source
packing  samples end to end, or padded, as a PackedBatch
batches  the batches of a run's steps
"""
