"""Schedules: the learning rate of a step, a pure function of the step and the run's spec."""

import math

from kdpipe.manifests.specs import TrainSpec


def learning_rate(step: int, num_steps: int, spec: TrainSpec) -> float:
    """Rate of step `step` of `num_steps`: up in a line over warmup_ratio of them, then down to min_lr_ratio * lr.

    Every step has a rate above zero: the rise starts one step before the first, the fall ends one step after the last.
    """
    warmup = int(spec.warmup_ratio * num_steps)
    if step < warmup:
        return spec.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(num_steps - warmup, 1)
    shape = {"cosine": 0.5 * (1.0 + math.cos(math.pi * done)), "linear": 1.0 - done, "constant": 1.0}[spec.schedule]
    return spec.lr * (spec.min_lr_ratio + (1.0 - spec.min_lr_ratio) * shape)
