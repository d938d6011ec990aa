"""Formula: what a model's config puts between the head's matrix product and the logits: a scale, a soft cap.

Read by the config's field names; the teacher's canary and the student's exam compare it with the model's own logits.
"""

from transformers import PretrainedConfig

from kdpipe.stages.models.head import Finish

# Where each family keeps the soft cap on its final logits.
SOFTCAP_FIELDS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

# Start of model_type, config field, and whether logits are multiplied (+1) or divided (-1) by it. A family that is not
# listed and scales all the same is found out by the teacher's canary.
SCALE_FIELDS = (
    ("cohere", "logit_scale", 1),
    ("granite", "logits_scaling", -1),
    ("minicpm3", "logits_scaling", -1),
    ("hyperclovax", "logits_scaling", 1),
    ("falcon_h1", "lm_head_multiplier", 1),
)


def logit_formula(config: PretrainedConfig) -> Finish:
    """What a model's config puts between the matrix product and the logits."""
    text = config.get_text_config()
    caps = (getattr(text, name, None) for name in SOFTCAP_FIELDS)
    scale = 1.0
    for family, field, power in SCALE_FIELDS:
        if text.model_type.startswith(family):
            scale = float(getattr(text, field)) ** power
    return Finish(softcap=next((float(cap) for cap in caps if cap), None), scale=scale)
