"""[live]: a teacher at work beside its students, and answers that a model writes."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue

from kdpipe.manifests.specs.base import Count, Flag, Fraction, Spec

LEAST_TEMPERATURE = 1e-3
STALENESS_AHEAD = 4
"""max_staleness where answers are written ahead."""


def _temperature(value: float) -> float:
    if 0.0 < value < LEAST_TEMPERATURE:
        raise ValueError(f"expected 0 (the most likely token each time) or at least {LEAST_TEMPERATURE}")
    return value


OF_PLACES = {
    *("tee", "ring_mib", "teacher_cores", "teacher_gpus", "student_gpus", "rollout_tp", "rollout_mem_fraction"),
    "beta",  # in [loss], which says what it makes of it
}
"""Keys that do not decide which answers a student writes."""
Indices = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...],
    BeforeValidator(lambda given: (given,) if isinstance(given, int) else given),
]


class LiveSpec(Spec):
    """[live]: a teacher at work beside its students, and answers that a model writes."""

    lmbda: Fraction = 0.5
    """Share of the samples that the student answers itself, drawn one by one at each step (GKD's lambda). The others
    have the data's answer; a record without one is always answered by the student."""
    beta: Fraction | None = None
    """Train on the generalised Jensen-Shannon divergence of GKD: 0 is the forward KL, 1 the reverse KL. loss.divergence
    decides when not given."""
    seq_kd: bool = False
    """The answers of the samples that the student does not answer itself are the teacher's, written before the first
    step, instead of the data's: sequence-level distillation."""
    samples_per_prompt: Count = 1
    """Answers that are written to each prompt."""
    max_new_tokens: Count = 512
    """Longest answer in tokens. One that is cut there has no end of turn, and none is added."""
    truncated: Literal["train", "drop"] = "train"
    """What becomes of the student's answers that were cut at max_new_tokens: trained on up to their last token, or left
    out of the loss and counted (the overlong filtering of DAPO, arXiv 2503.14476)."""
    temperature: Annotated[float, Field(ge=0.0, le=1e3), AfterValidator(_temperature)] = 1.0
    """Of the answers that are written: logits are divided by it; 0 takes the most likely token each time."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Least probability of the most likely tokens together among which one is drawn."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Most likely tokens among which one is drawn; 0: all."""
    overlap: Annotated[int, Field(ge=0)] = 0
    """Steps whose answers are written ahead, so that the teacher scores them while the student trains; they are so
    many optimizer steps old when their turn comes."""
    max_staleness: Annotated[int | None, Field(ge=0)] = None
    """Optimizer steps that an answer may be old when it is trained on; 0 when not given, 4 with an overlap. Older
    ones are left out of the loss and counted."""
    importance_cap: Annotated[float | None, Field(gt=0.0)] = None
    """Weigh each token of an answer that older weights wrote by its probability now over that when it was written, at
    most this (truncated importance sampling); 1 to 10 are usual. Not given: all count alike."""
    rollout_engine: Literal["transformers", "sglang"] = "transformers"
    """What writes the student's answers: the student itself, in its own process, or SGLang beside it, which is given
    the student's weights after every step and, with an overlap, writes while the student trains."""
    rollout_tp: Count = 1
    """Tensor parallelism of SGLang that writes the student's answers, in GPUs."""
    rollout_mem_fraction: Annotated[float | None, Field(gt=0.0, lt=1.0)] = None
    """Share of each GPU's memory for the weights and KV cache of SGLang that writes the student's answers."""
    teacher_update_every: Count | None = None
    """Make the teacher anew of the student every so many optimizer steps. Its architecture and sizes are the student's
    then, as those of --teacher student are, the student as it is at the start. The teacher stays as it is when not
    given."""
    ema: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the teacher that stays when it is made anew: the new one is ema * teacher + (1 - ema) * student, an
    exponential moving average that is kept in float32; 0 is a copy of the student."""
    tee: Annotated[Path | None, Flag(takes="FOLDER")] = None
    """Keep the rows that pass by as the shards of a cache in this folder, for further epochs and students; on-policy
    those of the student's own answers."""
    ring_mib: Count = 256
    """Shared memory between the teacher and each rank of the student, in MiB: rows that are ready before their step. It
    must hold the rows of the longest sample."""
    teacher_cores: Count | None = None
    """On a CPU: cores that are the teacher's alone, the others are the student's; half of them when not given."""
    teacher_gpus: Indices = ()
    """GPUs that are the teacher's, by their numbers among the visible ones: [0, 1]. When not given the first ones, as
    many as engine.tp, dp and pp ask for; a single GPU is both's."""
    student_gpus: Indices = ()
    """GPUs that are the student's, a rank each; those that are not the teacher's when not given."""

    @property
    def staleness_bound(self) -> int:
        """max_staleness as it is where it was not given."""
        if self.max_staleness is None:
            return STALENESS_AHEAD if self.overlap else 0
        return self.max_staleness

    def rollouts(self) -> dict[str, JsonValue]:
        """What decides which answers a student writes, as JSON values."""
        return self.model_dump(mode="json", exclude=OF_PLACES)
