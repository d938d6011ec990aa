"""Requests: the planned batches of a shard, as an engine is asked for them.

Pure but for `place`: which rows are probed, and which ids scored there, are functions of the sample and the seed.
"""

from collections.abc import Callable, Sequence

import numpy as np

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.plan import Plan
from kdpipe.manifests.sample import SampleTokens, num_rows, row_positions
from kdpipe.manifests.samples import cut_batches
from kdpipe.stages.teacher.engine import Request, RowTarget
from kdpipe.stages.teacher.gate import choose_probes, choose_scored, is_probed_inside

PROBES = 3
"""Rows of a sample whose log-probability is recomputed: the first, one between, the last."""
SEED_STRIDE = 1_000_003
"""Between the draws of two seeds: odd, so that other samples are probed inside."""


def shard_requests(
    cache: Cache, number: int, probe_every: int, place: Callable[[int, int], RowTarget]
) -> list[list[Request]]:
    """The planned batches of a shard; `place(sample, num_rows)` says where a sample's rows go."""
    plan, samples = cache.plan, cache.samples.shard(number)
    columns = {name: samples.column(name).to_numpy() for name in ("batch", "num_rows", "num_tokens")}
    token_ids = samples.column("token_ids").values.to_numpy()
    supervised = samples.column("supervised").values.to_numpy(zero_copy_only=False)
    starts = np.cumsum(columns["num_tokens"]) - columns["num_tokens"]
    batches: list[list[Request]] = [[] for _ in range(int(columns["batch"].max()) + 1)]
    for index, start in enumerate(starts):
        stop = start + columns["num_tokens"][index]
        sample = plan.shards[number].first_sample + index
        text = SampleTokens(token_ids=token_ids[start:stop], supervised=supervised[start:stop])
        target = place(sample, int(columns["num_rows"][index]))
        batches[int(columns["batch"][index])].append(sample_request(plan, sample, text, probe_every, target))
    return batches


def text_batches(
    texts: Sequence[SampleTokens],
    place: Callable[[int, int], RowTarget],
    *,
    probe_every: int,
    batch_tokens: int,
    every_row: bool,
    vocab_size: int,
) -> list[list[Request]]:
    """Samples that no plan has, as batches of a shard of theirs; their rows are placed in order."""
    cut = cut_batches([len(text.token_ids) for text in texts], batch_tokens)
    batches: list[list[Request]] = [[] for _ in range(int(cut.max(initial=-1)) + 1)]
    for number, text in enumerate(texts):
        request = request_of(
            number,
            text,
            place(number, num_rows(text.supervised, every=every_row)),
            draw=number,
            every_row=every_row,
            probe_every=probe_every,
            vocab_size=vocab_size,
        )
        batches[int(cut[number])].append(request)
    return batches


def sample_request(plan: Plan, sample: int, text: SampleTokens, probe_every: int, target: RowTarget) -> Request:
    """What an engine is asked for one sample."""
    return request_of(
        sample,
        text,
        target,
        draw=sample + plan.settings.seed * SEED_STRIDE,
        every_row=plan.settings.rows == "all",
        probe_every=probe_every,
        vocab_size=plan.head.vocab_size,
    )


def request_of(
    sample: int,
    text: SampleTokens,
    target: RowTarget,
    *,
    draw: int,
    every_row: bool,
    probe_every: int,
    vocab_size: int,
) -> Request:
    """What an engine is asked for a sample that no plan has. draw: decides what is probed"""
    positions = row_positions(text.supervised, every=every_row)
    probes = choose_probes(draw, len(positions), PROBES if is_probed_inside(draw, probe_every) else 1)
    return Request(
        sample=sample,
        token_ids=text.token_ids,
        positions=positions,
        probes=probes,
        scored=choose_scored(draw, text.token_ids, positions[probes], vocab_size),
        target=target,
    )
