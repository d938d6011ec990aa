"""Live modes: a teacher at work beside its students, joined by rings.

    serve    the teacher's side: what students ask for, through the engine and the gate, into their rings
    tee      what passes by on the way, kept as a cache
    beside   a training whose rows come from a ring

Cost: importing this package loads nothing.
"""
