"""The file of a run's rollouts: what goes on from it has what was written, to the bit."""

from pathlib import Path

import numpy as np

from kdpipe.stages.live.rollout_log import Rollout, RolloutLog
from kdpipe.stages.rollout.writer import Answer


def test_log_probabilities_are_the_same_floats_again(tmp_path: Path) -> None:
    """Of an engine's answer too, which has no entropies; odd numbers of every size."""
    random = np.random.default_rng(0)
    some = -np.exp(random.uniform(-30, 5, 4000)).astype(np.float32)
    logprobs = np.concatenate([some, np.array([0.0, -0.1, -1 / 3, -1e-45, -np.finfo(np.float32).max], np.float32)])
    ids = np.arange(len(logprobs), dtype=np.int32)
    for number, entropies in enumerate((np.zeros(0, np.float32), np.ones(len(ids), np.float32))):
        log = RolloutLog(tmp_path, number, lambda ids: "")
        answer = Answer(token_ids=ids, logprobs=logprobs, entropies=entropies, ended=True)
        log.write(3, [Rollout(index=number, sample=0, number=number, version=2, answer=answer)])
        log.length()
    found = RolloutLog(tmp_path, 0, str).ahead(3)[3]
    assert [found[number].answer.logprobs.tobytes() for number in (0, 1)] == [logprobs.tobytes()] * 2
    assert [len(found[number].answer.entropies) for number in (0, 1)] == [0, len(ids)]
