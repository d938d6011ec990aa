"""Live modes: a teacher at work beside its students, joined by rings.

serve    the teacher's side: what students ask for, through the engine and the gate, into their rings
"""
