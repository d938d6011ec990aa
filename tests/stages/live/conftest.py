"""Teachers of these tests are threads beside their students."""

import pytest
from transformers import PreTrainedModel


@pytest.fixture(autouse=True)
def tied_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """from_pretrained replaces tie_weights for the whole process while it loads; two at once may leave it replaced."""
    monkeypatch.setattr(PreTrainedModel, "tie_weights", PreTrainedModel.tie_weights)
