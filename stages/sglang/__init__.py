"""SGLang: one engine in a process of its own, whatever is asked of it.

    arguments  what it is started with
    process    started, asked, listened to, ended
    host       the other end: the only module that imports sglang
    sink       rows out of its scheduler, straight to their place
    session    that nothing of it is left

A teacher asks it for rows (stages/teacher/sglang_engine.py). Cost: importing this package loads nothing.
"""
