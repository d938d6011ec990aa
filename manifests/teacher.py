"""What a student needs to know of its teacher, without the teacher's checkpoint.

`teacher/head.json` and `teacher/head.safetensors` in a cache hold the lm_head and all that lies between the stored
row and the teacher's logits:

    logits = softcap * tanh((row @ weight.T + bias) * scale / softcap)      (softcap None: no tanh)

cut to the first `vocab_size` columns: the tokenizer's real size, not the padded one.
"""

from pydantic import BaseModel, ConfigDict

from kdpipe.manifests.specs import Dtype

TOP_K = "TopK"
"""In place of an architecture: a teacher of which a row has the likeliest tokens alone, imported from elsewhere."""


class HeadRecord(BaseModel):
    """teacher/head.json"""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    architecture: str
    """Class name of the model, e.g. Qwen3ForCausalLM, or TOP_K."""
    hidden_size: int
    """Width of a row."""
    vocab_size: int
    """Real vocabulary: ids the tokenizer can make, 0 to vocab_size-1."""
    head_rows: int
    """Rows of the weight; more than vocab_size where the checkpoint pads."""
    dtype: Dtype
    """Of weight and bias as stored: the engine's dtype."""
    tied: bool
    """Whether the weight is the embedding too."""
    has_bias: bool
    softcap: float | None
    """Final logit soft cap (Gemma), None where there is none."""
    scale: float
    """Factor on the logits (Cohere: logit_scale; Granite: 1/logits_scaling)."""

    @property
    def top_k(self) -> int | None:
        """Tokens that a row has, where it has no hidden state: k log-probabilities, falling, then the k ids."""
        return self.hidden_size // 2 if self.architecture == TOP_K else None
