"""Scale: what a cache and its students ask of disks, networks and name servers, at any size, by arithmetic alone.

The same counts as `kdpipe plan`, for sizes that no data file here has. docs/scale.md is made of them by
tools/scale_doc.py. Pure; seconds, bytes, operations.
"""

from dataclasses import dataclass

TOKEN_BYTES = 10
"""Of a token's id and mask, in samples.arrow and in its shard, as in stages/extract/forecast.py."""
SAMPLE_BYTES = 72
"""Of a sample's other columns in samples.arrow: content id, source, line, places."""
SHARD_ROW_BYTES = 32
"""Of a shard in shards.arrow: four int64."""
NAME_OPERATIONS = {"claim": 3, "shard": 4, "commit": 4, "looked for": 5}
"""Of a shard that is extracted: create, touch and unlink its claim; create, link, unlink and flush, for the shard and
for its commit record; stat and open by whoever plans, fills and checks. Each is a request to a name server."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machines:
    """What there is to compute with, and to read from.

    flops: operations a second that one GPU really reaches, in a forward pass and in training
    """

    nodes: int
    gpus: int = 8
    flops: float = 4e14

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """A teacher, data, and one student.

    supervised: share of the tokens whose rows are kept
    row_share: bytes of a stored row over those in bf16: 1 for raw, 0.5 for int8, some 0.25 for fisher
    """

    tokens: float
    teacher_params: float
    width: int
    student_params: float
    vocab: int = 151_936
    supervised: float = 0.5
    row_share: float = 1.0
    sample_tokens: float = 1000.0
    shard_tokens: int = 65_536

    @property
    def row_bytes(self) -> float:
        return 2 * self.width * self.row_share

    @property
    def bytes_a_token(self) -> float:
        """What a token costs on disk, on average."""
        return self.supervised * self.row_bytes + TOKEN_BYTES

    @property
    def cache_bytes(self) -> float:
        return self.tokens * self.bytes_a_token

    @property
    def table_bytes(self) -> float:
        """Of samples.arrow, which every process of a student maps."""
        return self.tokens * TOKEN_BYTES / 2 + self.tokens / self.sample_tokens * SAMPLE_BYTES

    @property
    def num_shards(self) -> float:
        return self.tokens / self.shard_tokens

    @property
    def shard_bytes(self) -> float:
        return self.shard_tokens * self.bytes_a_token

    @property
    def teacher_operations(self) -> float:
        """A token's."""
        return 2 * self.teacher_params

    @property
    def student_operations(self) -> float:
        """A token's: forward, backward and gradients, and the teacher's logits of a supervised one made again."""
        return 6 * self.student_params + 2 * self.vocab * self.width * self.supervised


@dataclass(frozen=True, kw_only=True, slots=True)
class Demands:
    """What a load asks of machines. Bandwidths in bytes a second, of the pass and of an epoch as fast as GPUs allow.

    names_a_second: requests to the name server while the teacher runs
    opens_a_second: of all ranks, when every sample of a step lies in another shard
    prepare_seconds: of one process that tokenises, at 2,900 samples a second (tools/bench/plan.py)
    """

    teacher_seconds: float
    epoch_seconds: float
    write_a_rank: float
    write_all: float
    read_a_rank: float
    read_a_node: float
    read_all: float
    names_a_second: float
    opens_a_second: float
    order_bytes: float
    prepare_seconds: float
    shard_seconds: float


SAMPLES_A_SECOND = 2900
ORDER_BYTES = 24
"""Of a sample while an epoch is shuffled on each rank: its index, its hash and its place, int64 each."""


def demands(load: Load, machines: Machines) -> Demands:
    """By the formulas of docs/scale.md."""
    teacher = load.tokens * load.teacher_operations / (machines.ranks * machines.flops)
    epoch = load.tokens * load.student_operations / (machines.ranks * machines.flops)
    read = load.cache_bytes / epoch
    return Demands(
        teacher_seconds=teacher,
        epoch_seconds=epoch,
        write_a_rank=load.cache_bytes / teacher / machines.ranks,
        write_all=load.cache_bytes / teacher,
        read_a_rank=read / machines.ranks,
        read_a_node=read / machines.nodes,
        read_all=read,
        names_a_second=load.num_shards * sum(NAME_OPERATIONS.values()) / teacher,
        opens_a_second=load.tokens / load.sample_tokens / epoch,
        order_bytes=load.tokens / load.sample_tokens * ORDER_BYTES,
        prepare_seconds=load.tokens / load.sample_tokens / SAMPLES_A_SECOND,
        shard_seconds=load.shard_tokens * load.teacher_operations / machines.flops,
    )


def staged_tokens(load: Load, disk_bytes: float) -> float:
    """Tokens of a cache that a node's own disk holds, two of them at a time: one is read, the next one is copied."""
    return disk_bytes / 2 / load.bytes_a_token


def staging_rate(load: Load, machines: Machines, disk_bytes: float, *, shared: bool) -> float:
    """Bytes a second from the file system that keep every node's own disk ahead of its GPUs.

    shared: each cache is read by all nodes, as the order over a cache asks; else each node has caches of its own
    """
    part = staged_tokens(load, disk_bytes)
    trained_by = machines.ranks if shared else machines.gpus
    seconds = part * load.student_operations / (trained_by * machines.flops)
    return machines.nodes * disk_bytes / 2 / seconds
