"""Training: one checked, its steps taken, its student exported and measured, one process a rank.

training    what a run is asked to do, opened and checked before a rank starts
samples     data files prepared for a training without a teacher
trainer     optimizer steps over batches; knows no folder and no signal
loop        the steps that are left, with checkpoints, evaluations and a wish to stop between them
checkpoint  a run's whole state in a folder      output    the folder the student is written to
schedule    the learning rate of a step          signals   the first one is noted, the next one ends the run
run         all of it, from its folders to a student
"""

from kdpipe.stages.train.run import train
from kdpipe.stages.train.samples import samples_beside
from kdpipe.stages.train.training import Found, Training, check_training, find

__all__ = ["Found", "Training", "check_training", "find", "samples_beside", "train"]
