"""Layout: how tokens are cut, from sizes and device alone.

Chunks of C tokens are what the matrix products run on, blocks of R rows what everything pointwise runs on; every block
has the same shape, so that one compilation does, and C is a multiple of R.
"""

# Shapes: T tokens, V shared vocabulary, D student width, C tokens per chunk, R rows per block.

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from kdpipe.stages.loss.problem import Problem

# Adding a chunk's head gradient to the sum moves 8*V*D bytes, the chunk's products are 2*C*V*(3*D + E) operations: with
# E = D the sum costs 20/C of the products on an EPYC core and some 210/C on an H100, so a GPU wants longer chunks.
CHUNK_TOKENS = {"cpu": 512, "cuda": 2048}

# Entries of a block: its rows in bf16 and fp32 stay in a core's L2 while a compiled pass goes over them; operator by
# operator, smaller ones cost less than the trips to memory. A GPU wants work to fill it.
COMPILED_ENTRIES = {"cpu": 2**19, "cuda": 2**24}
EAGER_ENTRIES = {"cpu": 2**17, "cuda": 2**23}

# Entries of a whole problem from which on compiling pays: it takes 2 to 4 s once, and saves 3 ns an entry each time.
WORTH_COMPILING = 2**24


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """C, R, how many chunks there are, and whether blocks are compiled."""

    chunk_tokens: int
    block_rows: int
    num_chunks: int
    compiled: bool

    @classmethod
    def of(cls, problem: Problem, chunk_tokens: int | None, *, sums_head: bool) -> "Layout":
        """chunk_tokens: None chooses; sums_head: several chunks need a sum of the head's gradient beside it."""
        hidden, compiled = problem.student.hidden, pays_to_compile(problem)
        wanted = chunk_tokens or chunk_size(
            problem.num_tokens, hidden.shape[1], device=hidden.device.type, sums_head=sums_head
        )
        size = max(min(wanted, problem.num_tokens), 1)
        rows = min(rows_per_block(problem.vocab_size, hidden.device, compiled=compiled), size)
        size = -(-size // rows) * rows
        return cls(chunk_tokens=size, block_rows=rows, num_chunks=-(-problem.num_tokens // size), compiled=compiled)


def chunk_size(num_tokens: int, student_width: int, *, device: str, sums_head: bool) -> int:
    """Tokens per chunk; sums_head: with several chunks the head's gradient needs an fp32 sum beside it."""
    # In 2-byte inputs one chunk of T costs 4*T*V + 2*V*D bytes, chunks of C cost 4*C*V + 6*V*D with the sum:
    # up to T = C + D one chunk is both smaller and faster.
    usual = CHUNK_TOKENS.get(device, CHUNK_TOKENS["cuda"])
    if num_tokens <= usual + (student_width if sums_head else 0):
        return max(num_tokens, 1)
    num_chunks = -(-num_tokens // usual)
    return -(-num_tokens // num_chunks)


def rows_per_block(vocab_size: int, device: torch.device, *, compiled: bool) -> int:
    """R: at least one row, the same number for each thread."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    sizes = COMPILED_ENTRIES if compiled else EAGER_ENTRIES
    return threads * max(1, sizes.get(device.type, sizes["cuda"]) // vocab_size)


def row_blocks(num_rows: int, size: int) -> Iterator[slice]:
    """slice(0, size), slice(size, 2 * size) ... up to num_rows."""
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


def pays_to_compile(problem: Problem) -> bool:
    """Whether the problem is large and this machine can compile for its device."""
    if problem.num_tokens * problem.vocab_size < WORTH_COMPILING or os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        return False
    return problem.student.hidden.device.type != "cpu" or has_compiler()


@lru_cache(maxsize=1)
def has_compiler() -> bool:
    """Whether there is a C++ compiler, which torch.compile needs on a CPU."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None
