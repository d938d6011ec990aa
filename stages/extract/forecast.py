"""Forecast: what an extraction will make, before anything is written or a weight is loaded."""

from collections import Counter
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from kdpipe.manifests.codec import CODECS, find_codec, num_bytes
from kdpipe.manifests.errors import (
    TeacherError,
)
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.sample import is_heldout, num_rows
from kdpipe.stages.extract.reading import counts_of, read_samples
from kdpipe.stages.extract.spec import ExtractSpec
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.models.vocabulary import real_vocab_size
from kdpipe.stages.teacher.describe import describe_teacher


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What an extraction will make, known from data, tokenizer and config alone."""

    num_samples: int
    num_tokens: int
    num_rows: int
    num_heldout: int
    num_shards: int
    hidden_size: int
    vocab_size: int
    dtype: str
    counts: dict[str, int]
    bytes_per_codec: dict[str, int]
    head_bytes: int
    teacher_params: int


def forecast(spec: ExtractSpec, progress: Progress) -> Forecast:
    """Read the data as extract would and say what comes of it. Writes nothing, loads no weights."""
    find_codec(spec.codec, where="--codec")
    folder = ModelFolder(spec.teacher, TeacherError, spec.options.trust)
    info = describe_teacher(folder, spec.dtype)
    tokenizer = teacher_tokenizer(folder, progress)
    incidents: Counter[str] = Counter()
    unread: Counter[str] = Counter()
    num_samples = num_tokens = total_rows = num_heldout = 0
    read = read_samples(spec.reading(info), lambda incident: incidents.update([incident.kind]), unread, progress)
    with closing(read):
        for sample in read:
            num_samples += 1
            num_tokens += len(sample.token_ids)
            total_rows += num_rows(sample.supervised, every=spec.rows == "all")
            content_id = np.frombuffer(sample.content_id, np.uint8)[None]
            num_heldout += int(is_heldout(content_id, spec.data_spec.heldout_fraction)[0])
    # Ids and mask lie in samples.arrow and in the shard, 5 bytes a token each.
    overhead = num_tokens * 10
    stored = {
        name: num_bytes(codec, total_rows, info.hidden_size, info.dtype) + overhead for name, codec in CODECS.items()
    }
    return Forecast(
        num_samples=num_samples,
        num_tokens=num_tokens,
        num_rows=total_rows,
        num_heldout=num_heldout,
        num_shards=-(-num_tokens // spec.shard_tokens),
        hidden_size=info.hidden_size,
        vocab_size=real_vocab_size(spec.teacher, tokenizer, info.head_rows),
        dtype=info.dtype,
        counts=counts_of(num_samples, incidents, unread),
        bytes_per_codec=stored,
        head_bytes=num_bytes(CODECS["raw"], info.head_rows, info.hidden_size, info.dtype),
        teacher_params=info.num_params,
    )


def teacher_tokenizer(folder: ModelFolder, progress: Progress) -> PreTrainedTokenizerBase:
    """The teacher's tokenizer, with a note of how it was read where that needs one."""
    tokenizer = folder.tokenizer
    for note in folder.notes:
        progress.note(note)
    return tokenizer
