"""Check: what is found wrong with a student, for its caches, without a weight being read.

Its folder, tokenizer and vocabulary; the ids that pad and stop a text; how it generates; how long a text it reads.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import GENERATION_CONFIG_NAME

from kdpipe.manifests.adapter import base_of
from kdpipe.manifests.errors import ConfigError, StudentError, TeacherError, is_of_others
from kdpipe.stages.feed.dataset import Dataset, Teacher
from kdpipe.stages.models.context import context_of
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.models.own_code import asks_for_code, code_digest
from kdpipe.stages.models.vocabulary import real_vocab_size, vocabulary_difference, vocabulary_digest
from kdpipe.stages.teacher.describe import describe_teacher

IDS = ("pad_token_id", "eos_token_id")
"""Config fields that name ids which end up in a batch or end a text."""


def check_student(model: ModelFolder, *teachers: Teacher) -> None:
    """Whether the student can learn from the teachers' rows; without any, from samples of its own tokenizer.

    Raises StudentError for a folder without config or weights, a tokenizer that is not the teacher's, a vocabulary too
    small for its ids, ids outside of it, a generation config that does not load.
    """
    if not teachers:
        _check_model(model, own_vocab_size(model), "its tokenizer's")
    for teacher in teachers:
        if teacher.beside is not None:
            _check_model(model, own_vocab_size(model), "its tokenizer's")
            continue
        _check_model(model, teacher.record.vocab_size, "the cache's")
        if difference := tokenizer_difference(model, teacher):
            raise StudentError(
                f"its tokenizer is not that of {teacher.where}: {difference}; give the data that its rows are of too "
                "(--data), so that its texts are aligned with the teacher's",
                where=model.path,
            )


def tokenizer_difference(model: ModelFolder, teacher: Teacher) -> str:
    """The first token that the student's tokenizer does not have as the teacher's, in words; "" where it has all."""
    if vocabulary_digest(model.tokenizer) == teacher.vocabulary_digest:
        return ""
    return vocabulary_difference(model.tokenizer, _kept_tokenizer(teacher))


def own_vocab_size(model: ModelFolder) -> int:
    """Ids of the student's own tokenizer that it has an output for. Raises StudentError as real_vocab_size does."""
    head_rows = model.config.get_text_config().vocab_size
    return real_vocab_size(model.path, model.tokenizer, head_rows, StudentError)


def check_student_of(folder: Path, teacher: Path, trust: str | None = None) -> str:
    """Whether the student in `folder` can learn from a cache of this teacher, before there is one.

    trust: digest of the teacher's own code that may run, and of the student's where it has the same
    What could not be checked is returned in words, "" for nothing. Raises StudentError as check_student does,
    TeacherError for a folder that is no teacher.
    """
    if (model := _readable(folder, trust)) is None:
        return f"{folder} brings its own code: train checks the student when that code is allowed"
    other = ModelFolder(teacher, TeacherError, trust)
    if vocabulary_difference(model.tokenizer, other.tokenizer):
        _check_model(model, own_vocab_size(model), "its tokenizer's")
        return f"{folder} has another tokenizer than the teacher: kdpipe train aligns its texts (student.align)"
    _check_model(model, real_vocab_size(teacher, other.tokenizer, describe_teacher(other).head_rows), "the teacher's")
    return ""


def has_other_tokenizer(folder: Path, teacher: Path, trust: str | None = None) -> bool:
    """Whether the student's texts are aligned with its teacher's; False where that takes code that is not allowed."""
    model = _readable(folder, trust)
    other = ModelFolder(teacher, TeacherError, trust)
    return model is not None and bool(vocabulary_difference(model.tokenizer, other.tokenizer))


def _readable(folder: Path, trust: str | None) -> ModelFolder | None:
    """A student's folder; None where it brings code of its own that is not allowed."""
    own = asks_for_code(base := base_of(folder))
    if own and not (trust and code_digest(base).startswith(trust)):
        return None
    return ModelFolder(folder, StudentError, trust if own else None)


def _check_model(model: ModelFolder, vocab_size: int, whose: str) -> None:
    """Its folder, the size of its vocabulary, its ids and how it generates."""
    size = model.config.get_text_config().vocab_size
    if size < vocab_size:
        raise StudentError(
            f"its vocabulary has {size} ids, {whose} has {vocab_size}; "
            "enlarge its embedding (resize_token_embeddings) or pick a student of the teacher's family",
            where=model.path,
        )
    _check_ids(model.config, model.file("config.json"), size)
    _check_generation(model.file(GENERATION_CONFIG_NAME), size)
    model.examine()


def require_context(model: ModelFolder, dataset: Dataset, samples: np.ndarray) -> None:
    """Every one of the samples must fit the student's context. Raises StudentError with how many do not."""
    context = context_of(model.config)
    lengths = dataset.num_tokens[samples]
    if context is None or not len(lengths) or lengths.max() <= context.tokens:
        return
    raised = f", or raise {context.field} in its config.json if it is to learn longer texts" if context.rotary else ""
    raise StudentError(
        f"its context is {context.tokens} tokens ({context.field}), {(lengths > context.tokens).sum()} of the "
        f"{len(lengths)} samples of {dataset.names} are longer, up to {lengths.max()}; extract with --max-length "
        f"{context.tokens} into another cache, or take a student with a longer context{raised}",
        where=model.path,
    )


def require_compiler(device: torch.device) -> None:
    """What torch.compile needs on the device. Raises ConfigError."""
    # Seconds to import, for runs that compile alone.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    needed = "Triton and a GPU it knows" if device.type == "cuda" and not has_triton() else ""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        needed = "a C++ compiler (g++, or the one that the environment variable CXX names)"
    if needed:
        raise ConfigError(
            f"torch.compile needs {needed}, which is missing here; install it, or leave the key out",
            where="train.fsdp.compile",
        )


def checkpoint_dtype(model: ModelFolder) -> torch.dtype:
    """The dtype the student's own weights are stored in; float32 where its config does not say."""
    dtype = model.config.dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _kept_tokenizer(teacher: Teacher) -> PreTrainedTokenizerBase:
    """The teacher's, as it was kept: its vocabulary alone, for which a teacher's own code is not needed."""
    teacher.check_files()
    return PreTrainedTokenizerFast(tokenizer_file=str(teacher.folder / "tokenizer.json"))


def _check_generation(path: Path, vocab_size: int) -> None:
    """What save_pretrained would refuse (a temperature without sampling) is no fault: the file is exported as it is."""
    if not path.is_file():
        return
    try:
        config = GenerationConfig.from_pretrained(str(path.parent), local_files_only=True)
    except Exception as err:
        # transformers checks some fields and trips over others: OSError, ValueError, TypeError, AttributeError.
        if is_of_others(err):
            raise
        cause = " ".join(f"{err}".split())
        raise StudentError(f"it does not load: {cause}; mend it, or remove the file", where=path) from err
    _check_ids(config, path, vocab_size)


def _check_ids(config: Any, path: Path, vocab_size: int) -> None:
    """-1 stands for no id in old configs."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for field in IDS:
        value = getattr(text, field, None)
        for each in value if isinstance(value, list) else [value]:
            if each is not None and (type(each) is not int or not -1 <= each < vocab_size):
                raise StudentError(
                    f"{field} is {each!r}, the student's vocabulary has {vocab_size} ids; set one of them, or null",
                    where=path,
                )
