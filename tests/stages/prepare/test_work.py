"""Work: what becomes of a batch, and that it arrives whole from another process."""

import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from kdpipe.manifests.specs import DataSpec
from kdpipe.stages.prepare.sources import RawRecord
from kdpipe.stages.prepare.work import Preparing, Worked

LINES = [
    '{"prompt": "question", "completion": "answer", "id": 7}',
    '{"prompt": "q", "completion": ""}',
    '{"prompt": "q", "completion": "<|im_end|> within"}',
    '{"prompt": 3}',
    '{"prompt": "q", "completion": "' + "answer " * 50 + '"}',
]


def batch(lines: Sequence[str], end: str = "\n") -> list[RawRecord]:
    return [
        RawRecord(source="f.jsonl", line=n, place=f"f.jsonl:{n}", raw=(line + end).encode())
        for n, line in enumerate(lines, start=1)
    ]


def plain(worked: Worked) -> list[object]:
    """All that it says, comparable."""
    said: list[object] = [worked.unread, str(worked.failure)]
    for each in worked.outcomes:
        said += [each.place, each.incidents, str(each.error)]
        if (sample := each.sample) is not None:
            said += [sample.content_id, sample.source, sample.line, sample.truncated]
            for array in (sample.token_ids, sample.supervised):
                said += [array.dtype, array.tolist()]
    return said


@pytest.mark.parametrize("end", ["\n", ""], ids=["whole", "cut at its end"])
def test_what_became_of_a_batch_arrives_whole(chatml: Any, end: str) -> None:
    lines = LINES if end else [*LINES[:3], '{"prompt": "q']
    worked = Preparing(chatml, DataSpec(max_length=60), ())(batch(lines, end))
    kinds = [[incident.kind for incident in each.incidents] for each in worked.outcomes]
    assert kinds[:3] == [[], ["empty_completion"], ["special_token_in_text"]]
    if end:
        assert kinds[3:] == [["bad_record"], ["truncated"]]
        assert worked.failure is None
    else:
        assert len(worked.outcomes) == 3
        assert "f.jsonl:4" in str(worked.failure)
    assert worked.unread == {"id": 1}
    assert plain(pickle.loads(pickle.dumps(worked))) == plain(worked)


def test_an_empty_batch_arrives_too(chatml: Any) -> None:
    worked = pickle.loads(pickle.dumps(Preparing(chatml, DataSpec(), ())([])))
    assert (worked.outcomes, worked.unread, worked.failure) == ([], {}, None)


def test_samples_that_arrived_are_views_of_one_array(chatml: Any) -> None:
    """What keeps a batch's samples apart costs no copy."""
    worked = pickle.loads(pickle.dumps(Preparing(chatml, DataSpec(), ())(batch([LINES[0], LINES[0]]))))
    first, second = (each.sample for each in worked.outcomes)
    assert first is not None
    assert second is not None
    assert first.token_ids.base is second.token_ids.base is not None
    assert np.array_equal(first.token_ids, second.token_ids)
