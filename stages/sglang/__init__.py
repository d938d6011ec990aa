"""SGLang: one engine in a process of its own, whatever is asked of it.

    arguments  what it is started with
    process    started, asked, listened to, ended
    host       the other end, in which a sglang.Engine runs and its plugin is registered
    prefill    rows of a prompt, as a teacher asks for them
    writing    answers and log-probabilities, as a writer asks for them
    weights    a trainer's tensors in the schedulers; update: the trainer's side
    sink       rows out of its scheduler, straight to their place
    session    that nothing of it is left

A teacher asks it for rows (stages/teacher/sglang_engine.py), a writer for answers (stages/rollout/sglang_writer.py).
Cost: importing this package loads nothing.
"""
