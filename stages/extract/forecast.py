"""Forecast: what an extraction will make, before anything is written or a weight is loaded."""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from kdpipe.manifests.codec import CODECS, RAW, num_bytes
from kdpipe.manifests.errors import (
    TeacherError,
)
from kdpipe.manifests.fitted import Choice, choose, file_bytes, usual_share
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.sample import Sample, is_heldout, num_rows
from kdpipe.manifests.specs import Dtype
from kdpipe.manifests.tensorfile import DTYPES, TAGS
from kdpipe.stages.codec.fit import require_fittable
from kdpipe.stages.extract.reading import counts_of, read_samples
from kdpipe.stages.extract.spec import ExtractSpec
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.models.vocabulary import real_vocab_size
from kdpipe.stages.teacher.describe import describe_teacher


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What an extraction will make, known from data, tokenizer and config alone.

    num_files: files and folders of the cache
    bytes_per_codec: of rows, tables and the codec itself; fisher as it is asked for, or at a mean KL of 0.01, from
        experience
    longest: tokens of the longest sample
    """

    num_samples: int
    num_tokens: int
    num_rows: int
    num_heldout: int
    num_shards: int
    num_files: int
    longest: int
    hidden_size: int
    vocab_size: int
    dtype: Dtype
    counts: dict[str, int]
    bytes_per_codec: dict[str, int]
    head_bytes: int
    teacher_params: int

    def measured(self, shares: Mapping[str, float], spec: ExtractSpec) -> "Forecast":
        """With the bytes of codecs of which a share of raw rows' was measured, by what they are asked for."""
        raw, tables = num_bytes(RAW, self.num_rows, self.hidden_size, self.dtype), self.num_tokens * TABLE_BYTES
        choices = (choose("int8"), fisher_of(spec))
        known = {
            each.name: int(raw * shares[str(each)]) + tables + file_bytes(each, self.hidden_size)
            for each in choices
            if str(each) in shares
        }
        return replace(self, bytes_per_codec=self.bytes_per_codec | known)


TABLE_BYTES = 10
"""Of a token: ids and mask lie in samples.arrow and in the shard, 5 bytes each."""


def fisher_of(spec: ExtractSpec) -> Choice:
    """The fisher codec as it is asked for, or as it is when nothing is said."""
    asked = spec.codec_choice()
    return asked if asked.name == "fisher" else choose("fisher")


def forecast(spec: ExtractSpec, progress: Progress, *see: Callable[[Sample], None]) -> Forecast:
    """Read the data as extract would and say what comes of it. Writes nothing, loads no weights.

    see: each is called with every sample
    """
    spec.codec_choice()  # one that is not known is refused before the data are read
    folder = ModelFolder(spec.teacher, TeacherError, spec.options.trust)
    info = describe_teacher(folder, spec.dtype)
    tokenizer = teacher_tokenizer(folder, progress)
    incidents: Counter[str] = Counter()
    unread: Counter[str] = Counter()
    num_samples = num_tokens = total_rows = num_heldout = longest = 0
    read = read_samples(spec.reading(info), lambda incident: incidents.update([incident.kind]), unread, progress)
    with closing(read):
        for sample in read:
            for each in see:
                each(sample)
            num_samples += 1
            longest = max(longest, len(sample.token_ids))
            num_tokens += len(sample.token_ids)
            total_rows += num_rows(sample.supervised, every=spec.rows == "all")
            content_id = np.frombuffer(sample.content_id, np.uint8)[None]
            num_heldout += int(is_heldout(content_id, spec.data_spec.heldout_fraction)[0])
    if spec.codec_choice().is_fitted:
        require_fittable(total_rows, info.hidden_size, DTYPES[TAGS[info.dtype]])
    overhead = num_tokens * TABLE_BYTES
    raw = num_bytes(RAW, total_rows, info.hidden_size, info.dtype)
    stored = {
        name: num_bytes(codec, total_rows, info.hidden_size, info.dtype) + overhead for name, codec in CODECS.items()
    }
    for fitted in (choose("int8"), fisher_of(spec)):
        share = usual_share(fitted, info.hidden_size, info.dtype)
        stored.setdefault(fitted.name, int(raw * share) + overhead + file_bytes(fitted, info.hidden_size))
    num_shards = -(-num_tokens // spec.shard_tokens)
    return Forecast(
        num_samples=num_samples,
        num_tokens=num_tokens,
        num_rows=total_rows,
        num_heldout=num_heldout,
        num_shards=num_shards,
        num_files=files_of(num_shards),
        longest=longest,
        hidden_size=info.hidden_size,
        vocab_size=real_vocab_size(spec.teacher, tokenizer, info.head_rows),
        dtype=info.dtype,
        counts=counts_of(num_samples, incidents, unread),
        bytes_per_codec=stored,
        head_bytes=num_bytes(RAW, info.head_rows, info.hidden_size, info.dtype),
        teacher_params=info.num_params,
    )


FILES_OF_A_SHARD, OTHER_FILES = 2, 32
"""In a cache: a shard and its commit record; beside them plan, tables, the teacher's head and tokenizer, folders, logs
of runs, and what is on its way for a moment."""


def files_of(num_shards: int) -> int:
    """Files and folders of a cache: what it takes of a file system that counts them."""
    return FILES_OF_A_SHARD * num_shards + OTHER_FILES


def teacher_tokenizer(folder: ModelFolder, progress: Progress) -> PreTrainedTokenizerBase:
    """The teacher's tokenizer, with a note of how it was read where that needs one."""
    tokenizer = folder.tokenizer
    for note in folder.notes:
        progress.note(note)
    return tokenizer
