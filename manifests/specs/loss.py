"""[loss]: what a student minimises, and the losses of other projects under their names."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.specs.base import Count, Flag, Fraction, Spec

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "kdflow": {"divergence": "forward_kl", "temperature": 1.0, "kd_weight": 0.5, "scale_t2": False},
    "trl": {"divergence": "jsd", "temperature": 1.0, "kd_weight": 1.0, "scale_t2": False, "options": {"beta": 0.5}},
    "torchtune": {"divergence": "soft_cross_entropy", "temperature": 1.0, "kd_weight": 0.5, "scale_t2": False},
    "distillkit": {"divergence": "forward_kl", "temperature": 1.0, "kd_weight": 0.5, "scale_t2": True},
    "trl-gold": {
        "divergence": "jsd",
        "temperature": 1.0,
        "kd_weight": 1.0,
        "scale_t2": False,
        "options": {"beta": 0.5},
    },
    "trl-uld": {"temperature": 1.0, "kd_weight": 1.0, "scale_t2": False},
}
"""Losses of other projects at their defaults; docs/losses.md says how their names map."""


LOSS_OPTIONS = (
    *("alpha", "beta", "forward_share", "k", "power", "samples"),
    *("decay", "first_row", "hybrid", "matched_weight", "only_right", "tau", "threshold", "top_k", "unmatched_weight"),
)
"""Keys of loss.options over all divergences and methods across tokenizers; each takes its own, as docs/losses.md and
docs/cross-losses.md say."""


ALONE = ("kd_weight", "chunk_tokens", "label_smoothing", "z_loss", "router_weight", "head_grad_fp32")
"""Keys of [loss] that mean something without a teacher."""


TeacherMix = Literal["distributions", "losses", "route"]


class LossSpec(Spec):
    """[loss]: what a student minimises: (1 - kd_weight) * CE + kd_weight * KD."""

    preset: Annotated[
        Literal["kdflow", "trl", "torchtune", "distillkit", "trl-gold", "trl-uld"] | None, Flag("--loss-preset")
    ] = None
    """Start from another project's loss at its defaults, as docs/losses.md says; keys given beside it win."""
    divergence: str = "forward_kl"
    """Name of the divergence between teacher and student."""
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0
    """Both models' logits are divided by it."""
    kd_weight: Fraction = 1.0
    """Weight of the divergence; the rest goes to cross entropy. 0 trains on cross entropy alone."""
    scale_t2: bool = False
    """Multiply the divergence by temperature squared (Hinton et al. 2015)."""
    chunk_tokens: Count | None = None
    """Tokens whose logits exist at a time; chosen from the sizes when not given."""
    label_smoothing: Fraction = 0.0
    """Share of the cross-entropy's target that is spread evenly over the vocabulary."""
    z_loss: Annotated[float, Field(ge=0.0)] = 0.0
    """Adds this times the squared logarithm of the student's softmax denominator; 1e-4 keeps logits from drifting."""
    router_weight: Annotated[float | None, Field(ge=0.0)] = None
    """Weight of the load-balancing loss of a mixture of experts, which is added for every supervised token; that of the
    student's config (router_aux_loss_coef) when not given, 0 leaves it out."""
    head_grad_fp32: bool = True
    """Sum the head's gradient over chunks in float32; false saves memory and is as exact up to some 16 chunks."""
    teacher_mix: TeacherMix | None = None
    """What several teachers are to a student, where the caches are those of more than one: distributions compares it
    with the weighted average of their distributions, losses averages the divergences from each; route has every sample
    learnt from the teacher of its own cache. Caches of several teachers are refused without it. docs/mixtures.md"""
    teacher_weights: tuple[Annotated[float, Field(gt=0.0)], ...] = ()
    """Weight of each teacher under distributions or losses, in the order in which cache.path names them first; they
    are divided by their sum. All weigh the same when not given."""
    options: dict[str, float] = {}  # noqa: RUF012 - pydantic copies it
    """Options of the divergence, such as beta of jsd."""

    def without_teacher(self) -> "LossSpec":
        """This loss on data that have no teacher's rows: cross-entropy alone.

        Raises ConfigError where more was given than that can take.
        """
        given = sorted(self.model_fields_set - set(ALONE), key=lambda key: (key != "preset", key))
        more = given[:1] or (["kd_weight"] if "kd_weight" in self.model_fields_set and self.kd_weight else [])
        if more:
            raise ConfigError(
                f"{getattr(self, more[0])!r} is for a teacher's rows, which data alone do not have: leave it out and "
                "train on cross-entropy, or have the rows, by kdpipe extract and --cache or by kdpipe stream",
                where=f"loss.{more[0]}",
            )
        return self.model_copy(update={"kd_weight": 0.0})

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not isinstance(given.get("preset"), str) or given["preset"] not in PRESETS:
            return given
        start = dict(PRESETS[given["preset"]])
        if given.get("divergence", start.get("divergence")) != start.get("divergence"):
            start.pop("options", None)  # they are of the preset's divergence
        return start | given
