"""The projection between vocabularies: how a token is cut, what its pieces weigh, which pairs are alike."""

from collections.abc import Sequence

import pytest
import torch
from tests import tokenizers
from tests.stages.loss.cross.cases import Pairs

from kdpipe.stages.loss.cross import Projection, extra_of
from kdpipe.stages.loss.cross.projection import pieces_of
from kdpipe.stages.models.vocabularies import SharedVocabulary


def vocabularies(student: Sequence[bytes | None], teacher: Sequence[bytes | None]) -> Pairs:
    """Tokens of the same bytes are shared."""
    same = [(place, teacher.index(content)) for place, content in enumerate(student) if content and content in teacher]
    ids = torch.tensor(same, dtype=torch.int64).reshape(-1, 2)
    return Pairs(ids[:, 0], ids[:, 1], len(student), len(teacher), list(student), list(teacher))


STUDENT = [b"201", b"2", b" the", None, b"\xf0\x9f", b"20"]
TEACHER = [b"2", b"0", b"1", b" ", b"the", b" the", b"\xf0", b"\x9f", b"x"]


def test_a_numeral_of_the_students_is_cut_into_the_teachers_digits() -> None:
    found = pieces_of(vocabularies(STUDENT, TEACHER), None)
    assert found == [[0, 1, 2], [0], [5], [], [6, 7], [0, 1]]


def test_a_token_with_a_byte_that_the_teacher_lacks_has_no_pieces() -> None:
    assert pieces_of(vocabularies([b"2q", b"2"], TEACHER), None) == [[], [0]]


def test_the_teachers_own_tokenizer_is_taken_where_it_gives_the_same_bytes() -> None:
    """Here it cuts " the" behind its blank, where the longest match would not."""
    given = vocabularies([b" thex", b"x2"], TEACHER)
    assert pieces_of(given, {" thex": [3, 4, 8], "x2": [3, 8, 0]}.__getitem__) == [[3, 4, 8], [8, 0]]


def test_weights_decay_over_the_first_pieces_and_sum_to_one() -> None:
    projection = Projection([[0, 1, 2], [], [1, 1], [2]], top_k=2, decay=0.25, threshold=0.6)
    matrix = torch.zeros(len(projection.own), len(projection.columns))
    matrix[projection.sources, projection.targets] = projection.weights
    assert projection.own.tolist() == [0, 2, 3]
    assert projection.columns.tolist() == [0, 1, 2]
    torch.testing.assert_close(matrix, torch.tensor([[0.8, 0.2, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))


def test_without_decay_the_first_piece_has_all_the_weight() -> None:
    projection = Projection([[0, 1, 2], [1]], top_k=4, decay=0.0, threshold=0.6)
    assert projection.weights.tolist() == [1.0, 1.0]
    assert projection.targets.tolist() == [0, 1]


def test_pairs_alike_are_one_to_one_and_the_heavier_token_has_the_piece() -> None:
    projection = Projection([[5, 1, 2], [5], [6, 1], [7, 7]], top_k=4, decay=0.5, threshold=0.6)
    pairs = dict(zip(projection.near_student.tolist(), projection.near_teacher.tolist(), strict=True))
    assert pairs == {1: 5, 2: 6, 3: 7}
    strict = Projection([[5, 1, 2], [5], [6, 1]], top_k=4, decay=0.5, threshold=0.9)
    assert strict.near_student.tolist() == [1]


def test_a_projection_is_not_trained_and_not_in_a_checkpoint() -> None:
    projection = extra_of("xtoken", 3, 4, vocabularies(STUDENT, TEACHER), {})
    assert isinstance(projection, Projection)
    assert not list(projection.parameters())
    assert not projection.state_dict()
    assert projection.own.tolist() == [0, 1, 2, 4, 5]


@pytest.mark.parametrize(("student", "teacher"), [("byte_level", "unigram"), ("unigram", "byte_level")])
def test_of_real_tokenizers_every_token_is_cut_into_its_own_bytes(student: str, teacher: str) -> None:
    own, theirs = getattr(tokenizers, student)(), getattr(tokenizers, teacher)()
    shared = SharedVocabulary.of(own, theirs, student_size=len(own), teacher_size=len(theirs))
    pieces = pieces_of(shared, lambda text: theirs.encode(text, add_special_tokens=False))
    assert len(pieces) == len(own)
    for content, parts in zip(shared.student_bytes, pieces, strict=True):
        found = [shared.teacher_bytes[part] for part in parts]
        assert not content or b"".join(part or b"" for part in found) == content, (content, found)
    assert sum(len(parts) > 1 for parts in pieces) > 50
