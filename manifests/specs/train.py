"""[train]: how and where a student is trained."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from kdpipe.manifests.specs.base import Count, DeviceChoice, Flag, Fraction, Spec, several

Logger = Literal["tensorboard", "wandb"]


class FsdpSpec(Spec):
    """[train.fsdp]: how a student lies on its ranks."""

    shard_size: Count | None = None
    """Ranks that share one copy of the student, each group of so many has a copy of its own; all ranks share one when
    not given. As many as a machine has GPUs keeps weights from crossing the network, at more memory."""
    optimizer_on_cpu: bool = False
    """Keep the float32 weights and AdamW's moments in the host's memory and take the optimizer's step there: for a
    student that the GPUs cannot hold otherwise; steps are slower. On a CPU they are there already."""
    compile: bool = False
    """Compile the layers with torch.compile: faster steps after a slow first one. Needs a C++ compiler."""


class TrainSpec(Spec):
    """How a student is optimised, saved and measured on the way."""

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
    export: Literal["adapter", "merged"] | None = None
    """What is written of a student that was trained by adapters (student.lora_rank): the adapter alone, which peft and
    kdpipe load with its base model, or the whole model with the adapter merged in; the adapter when not given."""
    fsdp: FsdpSpec = FsdpSpec()


class TrainTable(TrainSpec):
    """[train]: how a student is trained, where it runs and where it goes."""

    output: Annotated[Path | None, Flag(takes="FOLDER")] = None
    """Where the trained student goes."""
    nproc: Count | None = None
    """Processes, one a GPU; 1 on cpu and all GPUs on cuda when not given."""
    device: DeviceChoice = "auto"
    """Where the student is trained; auto takes GPUs where there are any."""
    loggers: Annotated[tuple[Logger, ...], BeforeValidator(several)] = ()
    """Who else is given the figures of events.jsonl: tensorboard (OUTPUT/tensorboard), wandb (offline in OUTPUT/wandb,
    unless WANDB_MODE or WANDB_API_KEY is set). Of no influence on the run."""
    group: Annotated[str | None, Flag(takes="NAME")] = None
    """Unix group that may read the output; otherwise only you can (files 0600, folders 0700)."""
