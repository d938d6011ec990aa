"""[student] and [eval]: the model that learns, and how one is measured."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from kdpipe.manifests.specs.base import CodeDigest, Count, DeviceChoice, DtypeChoice, Flag, Fraction, Spec, several

ALL_LINEAR = "all-linear"

OF_LORA = ("lora_alpha", "lora_dropout", "lora_targets", "lora_head")
"""Keys of a new adapter: of use with a lora_rank alone."""


def _layers(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise ValueError(f"it names no layer; leave the key out for {ALL_LINEAR}, or set lora_rank to 0")
    if ALL_LINEAR in names and len(names) > 1:
        raise ValueError(f"{ALL_LINEAR} stands for all of them and goes with no other name")
    return names


def _width(bits: int) -> int:
    if bits != 4:
        raise ValueError(f"{bits} bits are not offered; 4 is the only width")
    return bits


Align = Literal["auto", "none", "shared-vocab", "uld", "gold", "xtoken", "chunk", "dskd"]


class StudentSpec(Spec):
    """What of a student is trained."""

    lora_rank: Annotated[int, Field(ge=0)] = 0
    """Train low-rank adapters of this rank on linear layers, and nothing else (LoRA, by peft); 0 trains all weights, or
    goes on with the adapter where the student's folder is one."""
    lora_alpha: Annotated[float, Field(gt=0.0)] = 16.0
    """An adapter's product counts lora_alpha / lora_rank times."""
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of an adapter's inputs that are zero in a training step."""
    lora_targets: Annotated[tuple[str, ...], BeforeValidator(several), AfterValidator(_layers)] = (ALL_LINEAR,)
    """Names of the layers that get an adapter, as ["q_proj", "v_proj"]; all-linear: every linear one but the head."""
    lora_head: bool = False
    """An adapter on the output head too, where its weights are its own and not the embedding's."""
    lora_base_bits: Annotated[int, AfterValidator(_width)] | None = None
    """Keep the linear layers under the adapters in 4 bits (QLoRA: nf4, quantised twice, by bitsandbytes); in the
    precision of their files when not given."""
    lora_teacher: bool = False
    """With --data: the student's teacher is its own base, the same weights without the adapter, in the same pass; no
    rows are stored and no second model is loaded. loss says what is made of it."""


class StudentTable(StudentSpec):
    """[student]: the model that learns."""

    path: Annotated[Path | None, Flag("--student", "FOLDER")] = None
    """Student in Hugging Face format."""
    trust_remote_code: Annotated[CodeDigest | None, Flag(takes="DIGEST")] = None
    """Run the Python code that the student's folder brings (auto_map in its configs), if its sha256 is this one, or
    starts with it (12 digits or more). Without it such a model is refused and nothing of it runs; the message names
    the files to read and their digest. Code of another repository is never fetched."""
    align: Align = "auto"
    """How a student learns whose tokenizer is not the teacher's: the name of a method (docs/cross-tokenizer.md). auto
    takes shared-vocab then, none refuses. Without a part in training where the tokenizers agree."""
    align_floor: Fraction = 0.5
    """Least share of the supervised bytes that must be aligned with the teacher's text; less is refused."""


class EvalSpec(Spec):
    """[eval]: how a student is measured on held-out rows."""

    student: Annotated[Path | None, Flag(takes="FOLDER")] = None
    """Student in Hugging Face format; train.output of the run file when not given, else its student.path."""
    heldout_fraction: Fraction | None = None
    """Share of the samples to measure on, chosen by content; when not given the student's, else the cache's."""
    device: DeviceChoice = "auto"
    """Where the student runs; auto takes GPUs where there are any."""
    dtype: DtypeChoice = "auto"
    """Precision of the student; auto is the one its weights are stored in."""
    batch_tokens: Count | None = None
    """Tokens of a forward pass; train.batch_tokens of the run file when not given, 16384."""
