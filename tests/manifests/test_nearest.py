"""What somebody may have meant: other spellings, other projects' names, misspelt words."""

from kdpipe.manifests.nearest import OTHER_NAMES, nearest
from kdpipe.manifests.specs import LOSS_OPTIONS, RunFile, full_keys, misspelt_keys
from kdpipe.stages.loss import DIVERGENCES
from kdpipe.stages.loss.cross import METHODS
from kdpipe.stages.teacher import ENGINES


def test_the_nearest_word_is_offered_only_where_one_is_near() -> None:
    assert nearest("temprature", ["temperature", "lr"]) == "; did you mean 'temperature'?"
    assert nearest("xyz", ["temperature", "lr"]) == ""


def test_another_case_and_another_projects_name_are_near() -> None:
    assert nearest("JSD", DIVERGENCES) == "; did you mean 'jsd'?"
    assert nearest("kl", DIVERGENCES) == "; did you mean 'forward_kl' or 'reverse_kl'?"
    assert nearest("bf16", ["bfloat16", "float32"]) == "; did you mean 'bfloat16'?"
    assert nearest("bf16", ["cpu", "cuda"]) == "", "a name of something else"


def test_other_names_lead_to_words_that_there_are() -> None:
    keys = {key for table in RunFile.model_fields.values() for key in table.annotation.model_fields}  # type: ignore[union-attr]
    words = {*keys, *DIVERGENCES, *ENGINES, *LOSS_OPTIONS, "bfloat16", "float16", "float32", "cuda", "cosine"}
    assert {name for names in OTHER_NAMES.values() for name in names} <= words


def test_a_bare_word_leads_to_the_whole_key() -> None:
    assert (full_keys("lr"), full_keys("learning_rate")) == (["train.lr"], ["train.lr"])
    assert (full_keys("beta"), full_keys("nonsense")) == (["live.beta", "loss.options.beta"], [])
    assert misspelt_keys("temprature") == ["loss.temperature", "live.temperature"]


def test_the_options_of_losses_are_those_of_their_table() -> None:
    tables = [*DIVERGENCES.values(), *METHODS.values()]
    assert sorted(LOSS_OPTIONS) == sorted({name for entry in tables for name in entry.options})
