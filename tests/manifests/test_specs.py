"""Run files: what is in them is known, in range and of its type, or the error says which key is not."""

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.specs import RunFile, load


def refused(*overrides: str, path: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_file_and_no_override_gives_the_defaults() -> None:
    assert load(None) == RunFile()


def test_a_file_and_later_overrides_of_it(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[train]\nlr = 3e-4\nepochs = 2\n[loss]\ndivergence = 'jsd'\n[loss.options]\nbeta = 0.25\n")
    spec = load(path, ("train.lr=1e-3", "train.lr=2e-3", "loss.scale_t2=true", "train.betas=[0.8, 0.9]"))
    assert (spec.train.lr, spec.train.epochs, spec.train.betas) == (2e-3, 2.0, (0.8, 0.9))
    assert (spec.loss.divergence, spec.loss.options, spec.loss.scale_t2) == ("jsd", {"beta": 0.25}, True)


def test_a_word_needs_no_quotes_and_options_can_be_set_one_by_one() -> None:
    loss = load(None, ("loss.divergence=reverse_kl", "loss.options.beta=0.5", "loss.options.k=64")).loss
    assert (loss.divergence, loss.options) == ("reverse_kl", {"beta": 0.5, "k": 64.0})


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.fsdp=3", "'train.fsdp' = 3: expected a table of keys"),
        ("train.fsdp.shardsize=2", "unknown key 'train.fsdp.shardsize'; did you mean 'shard_size'?"),
        ("train.shard_size=2", "unknown key 'train.shard_size'; did you mean 'train.fsdp.shard_size'?"),
        ("train.fsdp.shard_size=0", "'train.fsdp.shard_size' = 0: expected greater than or equal to 1"),
        ("train.lrr=1", "unknown key 'train.lrr'; did you mean 'lr'?"),
        ("train.batch_token=1", "did you mean 'batch_tokens'?"),
        ("trian.lr=1", "unknown key 'trian'; did you mean 'train'?"),
        ("loss.temprature=2", "did you mean 'temperature'?"),
        ("loss.zzz=2", "unknown key 'loss.zzz' (known here: chunk_tokens, divergence,"),
        ("train.lr=0", "'train.lr' = 0: "),
        ("train.lr=inf", "'train.lr' = inf: "),
        ("train.lr=nan", "'train.lr' = nan: "),
        ("train.lr=fast", "'train.lr' = 'fast': "),
        ("train.lr=", "'train.lr' = '': "),
        ("train.epochs=[1]", "'train.epochs' = [1]: "),
        ("train.batch_tokens=0", "'train.batch_tokens' = 0: "),
        ("train.batch_tokens=1.5", "'train.batch_tokens' = 1.5: "),
        ("train.betas=0.5", "'train.betas' = 0.5: expected a list"),
        ("train.betas=[0.9]", "'train.betas"),
        ("train.schedule=cosin", "'train.schedule' = 'cosin': "),
        ("train=3", "'train' = 3: "),
        ("loss.kd_weight=1.1", "'loss.kd_weight' = 1.1: "),
        ("loss.temperature=-1", "'loss.temperature' = -1: "),
        ("loss.options.beta=half", "'loss.options.beta' = 'half': "),
        ("loss.options=3", "'loss.options' = 3: expected a table"),
        ("data.heldout_fraction=2", "'data.heldout_fraction' = 2: "),
        ("train.lr.x=1", "'train.lr' = "),
    ],
)
def test_a_bad_override_names_the_key_and_what_came(override: str, says: str) -> None:
    message = refused(override)
    assert message.startswith("E-CONFIG --set: ")
    assert says in message


@pytest.mark.parametrize("override", ["train.lr", "=3", "train.=3", ".lr=3", ""])
def test_an_override_of_another_form_is_shown_the_form(override: str) -> None:
    assert f"'{override}' is not of the form table.key=value" in refused(override)


def test_keys_given_beside_a_preset_win_and_another_divergence_leaves_its_options() -> None:
    loss = load(None, ("loss.preset=trl", "loss.kd_weight=0.25")).loss
    assert (loss.divergence, loss.kd_weight, loss.options) == ("jsd", 0.25, {"beta": 0.5})
    loss = load(None, ("loss.divergence=forward_kl", "loss.preset=trl")).loss
    assert (loss.divergence, loss.kd_weight, loss.options) == ("forward_kl", 1.0, {})
    assert load(None, ("loss.preset=trl", "loss.options.beta=0.9")).loss.options == {"beta": 0.9}


def test_a_value_is_no_table(tmp_path: Path) -> None:
    assert "'lr' is a value, not a table" in refused("train.lr=1", "train.lr.x=2")


def test_the_place_is_the_file_or_the_override_that_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[train]\nlrr = 1\n")
    assert refused("train.lr=1", path=path).startswith(f"E-CONFIG {path}: unknown key 'train.lrr'")
    path.write_text("[train]\nlr = 1\n")
    assert refused("train.lrr=1", path=path).startswith("E-CONFIG --set: unknown key 'train.lrr'")


@pytest.mark.parametrize("content", [b"[train\n", b"lr = \xff", b"a = 1\na = 2\n"])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    assert refused(path=path).startswith(f"E-CONFIG {path}: not a TOML file: ")


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    assert "there is no such run file" in refused(path=tmp_path / "none.toml")
    assert "not a TOML file" in refused(path=tmp_path)


@given(st.text(max_size=30), st.text(max_size=30))
def test_no_override_whatever_gives_anything_but_a_spec_or_our_error(key: str, value: str) -> None:
    with contextlib.suppress(ConfigError):
        assert isinstance(load(None, (f"{key}={value}",)), RunFile)


@pytest.mark.parametrize(
    "override",
    ["loss.temperature=true", "loss.kd_weight=false", "loss.options.k=true", "train.lr=true", "loss.preset=[1]"],
)
def test_what_is_no_number_or_name_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0].removesuffix(".k")):
        load(None, (override,))


def test_shares_of_caches_are_one_a_cache_and_above_0() -> None:
    caches = "cache.path=['a', 'b']"
    assert load(None, (caches, "cache.weights=[3, 1]")).cache.weights == (3.0, 1.0)
    assert "'cache.weights' = [1]: 1 weights for 2 caches; give one each" in refused(caches, "cache.weights=[1]")
    assert "cache.weights" in refused(caches, "cache.weights=[1, 0]")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("student.lora_targets=[]", "it names no layer"),
        ("student.lora_targets=['all-linear', 'q_proj']", "goes with no other name"),
        ("student.lora_base_bits=8", "4 is the only width"),
    ],
)
def test_keys_of_adapters_are_refused_in_plain_words(override: str, says: str) -> None:
    assert says in refused(override)
