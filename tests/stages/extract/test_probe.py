"""A probe runs the teacher as extract does, and leaves nothing."""

from dataclasses import replace
from pathlib import Path

import pytest
from tests.conftest import Bench

from kdpipe.manifests.errors import GateError
from kdpipe.manifests.fitted import usual_share
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.specs import DataSpec
from kdpipe.stages.extract import ExtractSpec, forecast
from kdpipe.stages.extract import probe as probing
from kdpipe.stages.extract.forecast import fisher_of
from kdpipe.stages.extract.probe import Drawn, probe


@pytest.mark.parametrize("batch_tokens", [0, 600])
def test_every_drawn_sample_goes_through_engine_and_gate(
    batch_tokens: int, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ExtractSpec(teacher=bench.teacher, data=(bench.data,), data_spec=DataSpec(max_length=128), device="cpu")
    drawn, seen = Drawn(7), []
    forecast(spec, Silent(), drawn.see)
    monkeypatch.chdir(tmp_path)

    def admit(request: object, ack: object, admit=probing.admit) -> None:  # type: ignore[no-untyped-def]
        seen.append(request.sample)  # type: ignore[attr-defined]
        admit(request, ack)

    monkeypatch.setattr(probing, "admit", admit)
    found = probe(replace(spec, batch_tokens=batch_tokens), drawn.samples(), Silent())
    assert set(seen) == set(range(7))
    assert len(seen) == 7 + (1 if batch_tokens == 0 else len(seen) - 7), "the first batch twice"
    assert found.num_tokens == sum(len(sample.token_ids) for sample in drawn.samples())
    assert found.tokens_per_second == pytest.approx(found.num_tokens / found.seconds)
    assert found.start_seconds > 0
    assert list(tmp_path.iterdir()) == []


def test_a_probe_tells_what_each_codec_takes_and_loses(bench: Bench) -> None:
    spec = ExtractSpec(
        teacher=bench.teacher,
        data=(bench.data,),
        data_spec=DataSpec(max_length=128),
        device="cpu",
        codec="fisher",
        codec_kl=0.05,
    )
    drawn = Drawn(40)
    planned = forecast(spec, Silent(), drawn.see)
    found = probe(spec, drawn.samples(), Silent()).codecs
    assert list(found) == ["int8", "fisher kl=0.001", "fisher kl=0.01", "fisher kl=0.03", "fisher kl=0.05"]
    shares, losses = ([each[name] for each in list(found.values())[1:]] for name in ("share_of_raw", "kl_mean"))
    assert shares == sorted(shares, reverse=True)
    assert losses == sorted(losses)
    assert losses[-1] <= 0.05
    measured = planned.measured({name: each["share_of_raw"] for name, each in found.items()}, spec)
    raw, fisher = (measured.bytes_per_codec[name] - 10 * planned.num_tokens for name in ("raw", "fisher"))
    assert fisher == pytest.approx(shares[-1] * raw + 8 * planned.hidden_size**2, abs=1)
    before = planned.bytes_per_codec["fisher"] - 10 * planned.num_tokens
    usual = usual_share(fisher_of(spec), planned.hidden_size, planned.dtype)
    assert before == pytest.approx(usual * raw + 8 * planned.hidden_size**2, abs=1)
    assert measured.bytes_per_codec["raw"] == planned.bytes_per_codec["raw"]
    shortest = min(drawn.samples(), key=lambda sample: len(sample.token_ids))
    assert probe(spec, [shortest], Silent()).codecs == {}


def test_wrong_rows_end_a_probe(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ExtractSpec(teacher=bench.teacher, data=(bench.data,), data_spec=DataSpec(max_length=128), device="cpu")
    drawn = Drawn(2)
    forecast(spec, Silent(), drawn.see)

    def refuse(request: object, ack: object) -> None:
        raise GateError("swapped")

    monkeypatch.setattr(probing, "admit", refuse)
    with pytest.raises(GateError, match="swapped"):
        probe(spec, drawn.samples(), Silent())
