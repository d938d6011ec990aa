"""Export: the trained student as from_pretrained loads it, with all that lay beside its weights.

    folder -> Companions (bytes, read before the first step) -> export -> weights + companions

Invariant: a file that training has no reason to change is written byte for byte as it was when the run began, whatever
becomes of the folder meanwhile. Changed are the chat template, to the one that the cache's data was rendered with, and
the ids at which generation stops, to which those are added that the student learns to end its turns with.
"""

import copy
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import CHAT_TEMPLATE_DIR, CHAT_TEMPLATE_FILE, GENERATION_CONFIG_NAME

from kdpipe.manifests.sample import SampleTokens
from kdpipe.stages.feed.dataset import Dataset, Teacher
from kdpipe.stages.models.adapter import is_adapted, own_name
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.models.own_code import NO_CODE, OwnCode
from kdpipe.stages.student.lora import Lora, write_adapter
from kdpipe.stages.student.student import Student

RUNS, RUN = 8, 32
"""Of so many runs of so many samples the answers' last tokens are looked at."""
STOP_SHARE = 0.05
"""Of the answers that end with a special token: fewer are cut off there by chance."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AdapterExport:
    """An adapter that is written by itself; digest: of its base"""

    lora: Lora
    base: Path
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Companions:
    """What is exported beside the weights.

    files: by name in the folder
    stop_ids: that the student learns to end its answers with
    dtype: of the weights
    code: the student's own, which goes with it: the digest that allows it is the same as before
    notes: what of it is not as it was in the student's folder, a line each
    added_stops: of the stop ids those that training has added, this one or one before
    adapter: written instead of all weights
    """

    files: Mapping[str, bytes]
    stop_ids: tuple[int, ...]
    dtype: torch.dtype
    code: OwnCode = NO_CODE
    notes: tuple[str, ...] = ()
    added_stops: tuple[int, ...] = ()
    adapter: AdapterExport | None = None


def companions(model: ModelFolder, dataset: Dataset, dtype: torch.dtype) -> Companions:
    """Those of the student in a folder, which is trained on the data set; dtype: of its weights."""
    tokenizer = model.tokenizer
    files = {name: model.file(name).read_bytes() for name in model.tokenizer_files}
    if (generation := model.file(GENERATION_CONFIG_NAME)).is_file():
        files[GENERATION_CONFIG_NAME] = generation.read_bytes()
    samples = _sampled(dataset)
    notes = []
    stop_ids = trained_stops(samples, tokenizer)
    stated = _stated_stops(files, model.file("config.json"))
    if missing := [each for each in stop_ids if each not in stated]:
        names = ", ".join(f"{tokenizer.convert_ids_to_tokens(each)} ({each})" for each in missing)
        notes.append(f"the exported student stops at {names} too, which it is trained to end its answers with")
    own = not dataset.teachers or dataset.teachers[0].beside is not None  # the data went through its own template
    template = None if own else _trained_template(dataset.teachers[0], tokenizer, samples)
    if template is not None:
        _replace_template(files, template)
        notes.append("the exported student has the chat template of the cache, which is not its folder's")
    added = {*missing, *(model.stop_ids - model.untrained_stop_ids)}
    return Companions(
        files=files,
        stop_ids=stop_ids,
        dtype=dtype,
        code=model.code,
        notes=tuple(notes),
        added_stops=tuple(sorted(added)),
    )


def export(student: Student, beside: Companions, folder: Path, *, rank: int) -> None:
    """Write the student as from_pretrained loads it, or its adapter as peft does.

    Every rank calls it; rank 0 writes. Raises OSError.
    """
    model = student.model
    if (own := beside.adapter) is not None:
        write_adapter(model, own.lora, own.base, own.digest, folder, rank=rank)
        if rank == 0:
            _write_companions(beside, folder, None)
        return
    state = _merged_state(student, beside.dtype, rank) if is_adapted(model) else _state(student, beside.dtype, rank)
    if rank != 0:
        return
    if is_adapted(model):
        model = _plain(model)
    generation, model.generation_config = model.generation_config, GenerationConfig()
    try:
        model.save_pretrained(str(folder), state_dict=state)
    except SafetensorError as err:
        if (failed := _os_error(err)) is None:
            raise
        raise failed from err
    finally:
        model.generation_config = generation
    # save_pretrained writes the dtype the model has in memory, float32, whatever it was given to save.
    config = copy.deepcopy(model.config)
    config.dtype = beside.dtype
    config.save_pretrained(str(folder))
    made = (generation.to_json_string() + "\n").encode() if model.can_generate() else None
    _write_companions(beside, folder, made)


def _state(student: Student, dtype: torch.dtype, rank: int) -> dict[str, torch.Tensor]:
    """Weights and saved buffers by the model's names, on rank 0. Collective."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = {
        name.removeprefix("model."): tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in get_model_state_dict(student, options=options).items()
        if isinstance(tensor, torch.Tensor) and name.startswith("model.")  # not what a method has beside it
    }
    for tied in student.model.all_tied_weights_keys if rank == 0 else ():
        # Cast, the two names of a tied tensor no longer share memory, by which save_pretrained would know them.
        del state[tied]
    return state


def _merged_state(student: Student, dtype: torch.dtype, rank: int) -> dict[str, torch.Tensor]:
    """The same of a model with an adapter, which is merged in."""
    state = dict(student.weights(dtype, keep=rank == 0))
    saved = student.model.state_dict().keys()
    buffers = {name: buffer.cpu() for name, buffer in student.model.named_buffers() if name in saved}
    return state | {own_name(name): buffer for name, buffer in buffers.items()} if rank == 0 else {}


def _plain(model: Any) -> Any:
    """The model without its adapter and out of 4 bits, no weights in it: what save_pretrained takes names from."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    plain._weight_conversions = getattr(model, "_weight_conversions", None)
    plain.generation_config = model.generation_config
    return plain


def _os_error(err: SafetensorError) -> OSError | None:
    """The failed system call that safetensors has put into words."""
    number = re.search(r"\(os error (\d+)\)", str(err))
    return None if number is None else OSError(int(number[1]), os.strerror(int(number[1])))


def trained_stops(samples: list[SampleTokens], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Special tokens that answers end with, most frequent first."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    ends: Counter[int] = Counter()
    for text in samples:
        last = text.supervised & ~np.append(text.supervised[1:], False)
        ends.update(int(each) for each in text.token_ids[last] if int(each) in special)
    return tuple(each for each, count in ends.most_common() if count >= STOP_SHARE * ends.total())


def taught_stops(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Special tokens that the answers of a data set end with, most frequent first."""
    return trained_stops(_sampled(dataset), tokenizer)


def _sampled(dataset: Dataset) -> list[SampleTokens]:
    """Runs of samples from all over the data set."""
    starts = [place * len(dataset) // RUNS for place in range(RUNS)]
    chosen = {index for start in starts for index in range(start, min(start + RUN, len(dataset)))}
    return [dataset.tokens(index) for index in sorted(chosen)]


def _stated_stops(files: Mapping[str, bytes], config: Path) -> set[int]:
    """Ids at which the student of a config stops generating, by its own word."""
    text = files.get(GENERATION_CONFIG_NAME) or config.read_bytes()
    value = json.loads(text).get("eos_token_id")
    return set(value) if isinstance(value, list) else {value}


def _trained_template(
    teacher: Teacher, tokenizer: PreTrainedTokenizerBase, samples: list[SampleTokens]
) -> dict[str, bytes] | None:
    """The teacher's template files, where the data went through them and they are not the student's own."""
    teacher.check_files()
    files = {
        path.relative_to(teacher.folder).as_posix(): path.read_bytes()
        for pattern in (CHAT_TEMPLATE_FILE, f"{CHAT_TEMPLATE_DIR}/*.jinja")
        for path in teacher.folder.glob(pattern)
    }
    if CHAT_TEMPLATE_FILE not in files:
        return None
    own = tokenizer.chat_template
    templates = own if isinstance(own, dict) else {"default": own}
    theirs = {"default" if name == CHAT_TEMPLATE_FILE else Path(name).stem: text for name, text in files.items()}
    same = theirs.items() <= {name: (text or "").encode() for name, text in templates.items()}.items()
    return None if same or not _went_through(theirs["default"].decode(), tokenizer, samples) else files


def _went_through(template: str, tokenizer: PreTrainedTokenizerBase, samples: list[SampleTokens]) -> bool:
    """Whether samples have a special token that the template prints: plain texts go round it."""
    printed = [token for token in tokenizer.get_added_vocab() if token in template]
    ids = set(tokenizer.convert_tokens_to_ids(printed))
    return not ids or any(not ids.isdisjoint(sample.token_ids.tolist()) for sample in samples)


def _replace_template(files: dict[str, bytes], template: Mapping[str, bytes]) -> None:
    """Old folders keep the template in tokenizer_config.json, where it would be a second one."""
    for name in [name for name in files if name.endswith(".jinja")]:
        del files[name]
    files.update(template)
    config = json.loads(files.get(TOKENIZER_CONFIG_FILE, b"{}"))
    if config.pop("chat_template", None) is not None:
        files[TOKENIZER_CONFIG_FILE] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _write_companions(beside: Companions, folder: Path, made: bytes | None) -> None:
    """The files, those of generation with the trained stop ids; made: generation config of a student that had none."""
    files = dict(beside.files)
    generation = files.get(GENERATION_CONFIG_NAME, made)
    (folder / GENERATION_CONFIG_NAME).unlink(missing_ok=True)
    if generation is not None:
        files[GENERATION_CONFIG_NAME] = _with_stops(generation, beside.stop_ids)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)
    beside.code.write(folder)


def _with_stops(generation: bytes, stop_ids: tuple[int, ...]) -> bytes:
    """The generation config that stops at these ids too; as it is where it does already."""
    config = json.loads(generation)
    value = config.get("eos_token_id")
    stated = value if isinstance(value, list) else [] if value is None else [value]
    if set(stop_ids) <= set(stated):
        return generation
    ids = [*stated, *(each for each in stop_ids if each not in stated)]
    config["eos_token_id"] = ids if len(ids) > 1 else ids[0]
    return (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
