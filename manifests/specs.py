"""Specs: what a run file may say, one model a stage; every key has its unit, a misspelt one is an error.

Invariant: a spec that validated holds only known keys with values in range. `load` names the file, the key and the
nearest known key in its error.
"""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.nearest import OTHER_NAMES, near, nearest
from kdpipe.manifests.record import in_words

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Dtype = Literal["bfloat16", "float16", "float32"]
DtypeChoice = Literal["auto", "bfloat16", "float16", "float32"]
Device = Literal["cpu", "cuda"]
DeviceChoice = Literal["auto", "cpu", "cuda"]
RowsChoice = Literal["supervised", "all"]
Codec = Literal["raw"]
Io = Literal["mmap", "pread"]
"""How a cache's files are read: mapped, or with pread."""


class Spec(BaseModel):
    """Base of every spec: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        wanted = cls.model_fields[info.field_name or ""].annotation
        values = value.values() if get_origin(wanted) is dict and isinstance(value, dict) else (value,)
        if wanted is not bool and any(isinstance(each, bool) for each in values):
            raise ValueError("expected a number, got true or false")
        return value


class DataSpec(Spec):
    """[data]: how data files become samples."""

    max_length: Count = 4096
    """Longest sample in tokens, prompt and answer together."""
    overlong: Literal["truncate", "drop"] = "truncate"
    """What happens to a longer sample: its tail is cut off, or it is left out; both are counted."""
    supervise: Literal["assistant", "last", "completion", "all"] = "assistant"
    """Which tokens are targets: every assistant turn, the last one, the completion, or every token."""
    heldout_fraction: Fraction = 0.05
    """Share of the samples kept out of training for evaluation, chosen by each sample's content."""
    bad_records: Literal["stop", "skip"] = "stop"
    """A record that cannot be read ends the command with what is wrong, or is left out, counted and listed in runs/."""
    max_bad: Fraction = 0.01
    """Share of the records that may be left out as bad; more of them is an error."""
    strict: bool = False
    """A sample whose text is not what its record says is an error, not a count."""


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "kdflow": {"divergence": "forward_kl", "temperature": 1.0, "kd_weight": 0.5, "scale_t2": False},
    "trl": {"divergence": "jsd", "temperature": 1.0, "kd_weight": 1.0, "scale_t2": False, "options": {"beta": 0.5}},
    "torchtune": {"divergence": "soft_cross_entropy", "temperature": 1.0, "kd_weight": 0.5, "scale_t2": False},
    "distillkit": {"divergence": "forward_kl", "temperature": 1.0, "kd_weight": 0.5, "scale_t2": True},
}
"""Losses of other projects at their defaults; docs/losses.md says how their names map."""


LOSS_OPTIONS = ("alpha", "beta", "forward_share", "k", "power", "samples")
"""Keys of loss.options over all divergences; each takes its own, as docs/losses.md says."""


class LossSpec(Spec):
    """[loss]: what a student minimises: (1 - kd_weight) * CE + kd_weight * KD."""

    preset: Literal["kdflow", "trl", "torchtune", "distillkit"] | None = None
    """Start from the loss of another project, at its defaults; keys given beside it win."""
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
    head_grad_fp32: bool = True
    """Sum the head's gradient over chunks in float32; false saves memory and is as exact up to some 16 chunks."""
    options: dict[str, float] = {}
    """Options of the divergence, such as beta of jsd."""

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not isinstance(given.get("preset"), str) or given["preset"] not in PRESETS:
            return given
        start = dict(PRESETS[given["preset"]])
        if given.get("divergence", start["divergence"]) != start["divergence"]:
            start.pop("options", None)  # they are of the preset's divergence
        return start | given


class TrainSpec(Spec):
    """[train]: how a student is optimised."""

    lr: Annotated[float, Field(gt=0.0)] = 1e-4
    """Peak learning rate of AdamW."""
    epochs: Annotated[float, Field(gt=0.0)] = 1.0
    """Passes over the training samples; may be a fraction."""
    max_steps: Count | None = None
    """Optimizer steps at most; the schedule ends there."""
    batch_tokens: Count = 16384
    """Tokens an optimizer step takes, over all ranks and accumulation together."""
    grad_accum: Count = 1
    """Micro-batches a rank splits its share of a step into: less memory, same result."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps over which the learning rate rises from zero."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    min_lr_ratio: Fraction = 0.0
    """Where it ends, as a share of lr."""
    max_grad_norm: Annotated[float, Field(ge=0.0)] = 1.0
    """Gradients are clipped to this global norm; 0 leaves them alone."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """AdamW's decoupled weight decay, on matrices only."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    """Fixes the order of the samples and any dropout."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the forward and backward pass; weights, moments and reductions are float32 in every case."""
    eval_every: Annotated[int, Field(ge=0)] = 0
    """Steps between evaluations on held-out rows; 0 evaluates before the first step and at the end only."""
    save_every: Annotated[int, Field(ge=0)] = 200
    """Steps between checkpoints, from which an interrupted run goes on; 0 makes none."""
    save_minutes: Annotated[float, Field(ge=0.0)] = 15.0
    """Minutes after which a checkpoint is due whatever the steps, for runs of slow steps; 0 counts steps alone."""
    keep: Count = 2
    """Checkpoints kept, the newest; all are removed when the run is finished."""
    on_nonfinite: Literal["stop", "skip", "halve"] = "stop"
    """A step whose loss or gradient is not finite: stop, leave it out, or leave it out and halve the learning rate."""
    eval_tokens: Count = 16384
    """Tokens of held-out samples used by an evaluation before or during training; the last one takes all."""
    grad_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: less memory, a third more time."""


class RunSpec(Spec):
    """A whole run file."""

    data: DataSpec = DataSpec()
    loss: LossSpec = LossSpec()
    train: TrainSpec = TrainSpec()


def load(path: Path | None, overrides: tuple[str, ...] = ()) -> RunSpec:
    """The run file at `path` (TOML; None for all defaults) with `a.b=value` overrides applied in order.

    Raises ConfigError naming the file or override, the key and the nearest known key.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError("there is no such run file", where=path) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError, PermissionError) as err:
            raise ConfigError(f"not a TOML file: {err}", where=path) from None
    for override in overrides:
        _apply(tree, override)
    try:
        return RunSpec.model_validate(tree)
    except ValidationError as err:
        place = ".".join(str(part) for part in err.errors()[0]["loc"])
        keys = [override.partition("=")[0].strip() for override in overrides]
        overridden = any(f"{place}.".startswith(f"{key}.") or key.startswith(f"{place}.") for key in keys)
        raise ConfigError(_explain(err), where="--set" if overridden else path) from None


def _apply(tree: dict[str, Any], override: str) -> None:
    """Put `a.b=value` into the tree; the value is read as TOML, and as a string where it is none."""
    key, equals, text = override.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise ConfigError(f"'{override}' is not of the form table.key=value", where="--set")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *tables, leaf = (part.strip() for part in key.split("."))
    for table in tables:
        tree = tree.setdefault(table, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"'{key}': '{table}' is a value, not a table", where="--set")
    tree[leaf] = value


def full_keys(word: str) -> list[str]:
    """The keys of the run file that a bare word may stand for, whole: "lr" -> ["train.lr"], "k" -> ["loss.options.k"].

    Exact words and their other names alone, not misspelt ones.
    """
    wanted = {word, *OTHER_NAMES.get(word, ())}
    return [key for key in _all_keys() if key.rpartition(".")[2] in wanted]


def misspelt_keys(word: str) -> list[str]:
    """As `full_keys`, for the key that is spelled most like the word."""
    names = near(word, [key.rpartition(".")[2] for key in _all_keys()])
    return full_keys(names[0]) if names else []


def _all_keys() -> list[str]:
    """Every key of the run file, whole."""
    tables: Any = {table: entry.annotation for table, entry in RunSpec.model_fields.items()}
    keys = [f"{table}.{key}" for table, model in tables.items() for key in model.model_fields]
    return [*keys, *(f"loss.options.{name}" for name in LOSS_OPTIONS)]


def _explain(err: ValidationError) -> str:
    """The first of pydantic's findings as one line, with the nearest key or value for one that is unknown."""
    first = err.errors()[0]
    *tables, leaf = [str(part) for part in first["loc"]]
    key = ".".join([*tables, leaf])
    if first["type"] == "extra_forbidden":
        model: Any = RunSpec
        for table in tables:
            model = model.model_fields[table].annotation
        known = sorted(model.model_fields)
        meant = full_keys(leaf) or near(leaf, known) or misspelt_keys(leaf)
        hint = f"; did you mean '{meant[0]}'?" if meant else ""
        return f"unknown key '{key}'{hint} (known here: {', '.join(known)})"
    if first["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", first["ctx"]["expected"])
        return (
            f"'{key}' = {first['input']!r}: expected {first['ctx']['expected']}{nearest(str(first['input']), choices)}"
        )
    return f"'{key}' = {first['input']!r}: {in_words(first)}"
