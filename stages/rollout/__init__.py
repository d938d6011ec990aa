"""Rollouts: answers that a model writes, token ids in and token ids out.

    sampling  one next token a row, from its logits and a number in (0, 1)
    writer    what is asked of a writer, what it answers, and the contract of every writer
    decode    the writer in this process: any causal LM, sharded or whole
    sglang_writer  the writer in SGLang, whose weights follow a trainer's
    probe     whether it computes with the weights that the trainer thinks it has

Cost: importing this package loads nothing.
"""
