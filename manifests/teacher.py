"""What a student needs to know of its teacher, without the teacher's checkpoint.

`teacher/head.json` and `teacher/head.safetensors` in a cache hold the lm_head and all that lies between the stored
row and the teacher's logits:

    logits = softcap * tanh((row @ weight.T + bias) * scale / softcap)      (softcap None: no tanh)

cut to the first `vocab_size` columns: the tokenizer's real size, not the padded one.
"""

from pydantic import BaseModel, ConfigDict

from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.sidecar import LARGEST_ID, Sidecar, sidecar_of
from kdpipe.manifests.specs import Dtype


class HeadRecord(BaseModel):
    """teacher/head.json"""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    architecture: str
    """Class name of the model, e.g. Qwen3ForCausalLM, or of a side-car its kind."""
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
    def sidecar(self) -> Sidecar | None:
        """What a row has where it is no hidden state."""
        return sidecar_of(self.architecture, self.hidden_size, self.vocab_size)


def require_derivable(head: HeadRecord, sidecar: Sidecar, *, where: object) -> None:
    """A cache of this head has what a side-car keeps of its rows. Raises ConfigError. where: the cache"""
    if head.sidecar is not None:
        raise ConfigError(f"it has {head.sidecar.has}: derive from the cache it was made of", where=where)
    if sidecar.kind == "topk" and sidecar.entries > head.vocab_size:
        raise ConfigError(f"{sidecar.entries} tokens of a vocabulary of {head.vocab_size}; keep fewer", where="--top-k")
    if head.vocab_size > LARGEST_ID:
        raise ConfigError(f"a vocabulary of {head.vocab_size}: ids from {LARGEST_ID} on have no place", where=where)
