"""A student that writes answers of its own: what each step trains on, and what it is worth."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.conftest import Bench
from tests.stages.live.test_serve import serving
from tests.stages.ranks import Recorder
from tests.stages.train.test_train import training_for
from torch import Tensor
from transformers import AutoModelForCausalLM

from kdpipe.manifests.errors import CacheError, ConfigError, TemporaryError
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.sample import prompt_of
from kdpipe.manifests.specs import DataSpec, LossSpec, RunFile, TeacherSpec
from kdpipe.stages.align import Retelling
from kdpipe.stages.extract import ExtractSpec, extract
from kdpipe.stages.live.onpolicy import check_prompts, fed_by, find_onpolicy
from kdpipe.stages.live.rollouts import of_student
from kdpipe.stages.loss import Head, Side
from kdpipe.stages.loss.cross.reference import reference_across
from kdpipe.stages.loss.importance import Importance
from kdpipe.stages.loss.spans import Spans
from kdpipe.stages.ranks import joined
from kdpipe.stages.train import Found, Training, train
from kdpipe.stages.train.run import Run

REVERSE = LossSpec(divergence="reverse_kl")


def run_file(**live: object) -> RunFile:
    given = {"lmbda": 1.0, "max_new_tokens": 10} | live
    cache = given.pop("cache", ())
    return RunFile.model_validate({"live": given, "cache": {"path": cache}})


@contextmanager
def beside(bench: Bench, training: Training, run: RunFile) -> Iterator[Found]:
    """What the training is given with a teacher at work."""
    with serving(bench, 1, num_bytes=1 << 20) as (reader,):
        yield fed_by(reader, find_onpolicy(training, run), training, run)
        reader.finish()
        assert reader.take("the end") is None


def trained(bench: Bench, training: Training, run: RunFile, recorder: Recorder | None = None) -> Recorder:
    recorder = recorder or Recorder()
    with beside(bench, training, run) as found:
        train(training, recorder, found)
    return recorder


def rollouts(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "rollouts-00000.jsonl").read_text().splitlines()]


def of(recorder: Recorder, kind: str) -> list[dict]:
    return [fields for name, fields in recorder.events if name == kind]


def weights(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()


def test_who_answers_is_drawn_sample_by_sample_and_a_function_of_seed_and_step() -> None:
    samples = np.arange(4000)
    drawn = of_student(samples, 3, 7, 0.3)
    assert abs(drawn.mean() - 0.3) < 5 * (0.21 / 4000) ** 0.5
    assert np.array_equal(drawn[::7], of_student(samples[::7], 3, 7, 0.3)), "whatever else is in the step"
    assert not np.array_equal(drawn, of_student(samples, 4, 7, 0.3))
    assert not np.array_equal(drawn, of_student(samples, 3, 8, 0.3))
    assert of_student(samples, 3, 7, 1.0).all()
    assert not of_student(samples, 3, 7, 0.0).any()
    assert (of_student(samples, 3, 7, 0.5) | ~drawn).all(), "a larger share holds the smaller one"


def test_gradients_are_those_of_dense_logits_on_the_answers_that_were_written(bench: Bench, tmp_path: Path) -> None:
    training = training_for(bench, tmp_path, loss=REVERSE, grad_accum=2)
    run_spec = run_file(samples_per_prompt=2)
    tmp_path.mkdir(exist_ok=True)
    with beside(bench, training, run_spec) as found, joined(torch.device("cpu")) as ranks:
        run = Run(training, found, ranks)
        count = run.batches.num_supervised(0)
        sums = run.trainer.backward(0, count)
        gradients = {name: parameter.grad.full_tensor() for name, parameter in run.student.model.named_parameters()}
        planned = run.planned.samples(0)
        prompts = {int(each): prompt_of(found.dataset.tokens(int(each))) for each in planned}
    written = rollouts(tmp_path)
    assert sorted((each["sample"], each["number"]) for each in written) == sorted(
        (int(each), number) for each in planned for number in (0, 1)
    )
    assert len({tuple(each["token_ids"]) for each in written}) > len(planned), "two answers to a prompt differ"
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (bench.student, bench.teacher)
    )
    total, size = torch.zeros((), dtype=torch.float64), found.dataset.teachers[0].record.vocab_size
    for each in written:
        prompt = prompts[each["sample"]]
        ids = torch.tensor([*prompt.tolist(), *each["token_ids"]])[None]
        rows = slice(len(prompt) - 1, -1)
        ours = student(ids).logits[0, rows, :size].double().log_softmax(-1)
        with torch.no_grad():
            theirs = teacher(ids).logits[0, rows, :size].double().log_softmax(-1)
        total = total + (ours.exp() * (ours - theirs)).sum()
    assert sum(len(each["token_ids"]) for each in written) == count
    assert sums["kd"] == pytest.approx(float(total.detach()), rel=1e-5)
    (total / count).backward()
    for name, parameter in student.named_parameters():
        own = gradients[name]
        error = (own - parameter.grad).norm() / parameter.grad.norm().clamp_min(1e-12)
        assert error < 1e-4, (name, error)


@pytest.mark.parametrize("align", ["shared-vocab", pytest.param("gold", marks=pytest.mark.slow)])
def test_across_tokenizers_gradients_are_those_of_the_answers_as_either_model_reads_them(
    align: str, far_bench: Bench, tmp_path: Path
) -> None:
    """The teacher's row of a span is that of its own tokens behind its own prompt."""
    training = replace(
        training_for(far_bench, tmp_path, loss=LossSpec(), grad_accum=2), data=(far_bench.data,), align=align
    )
    run_spec = run_file(samples_per_prompt=2)
    run_spec = run_spec.model_copy(update={"teacher": run_spec.teacher.model_copy(update={"path": far_bench.teacher})})
    with beside(far_bench, training, run_spec) as found, joined(torch.device("cpu")) as ranks:
        run = Run(training, found, ranks)
        count = run.batches.num_supervised(0)
        sums = run.trainer.backward(0, count)
        gradients = {name: parameter.grad.full_tensor() for name, parameter in run.student.model.named_parameters()}
        share = run.batches.told(0)["rollout/aligned_share"]
        (told,), dataset = found.dataset.teachers, found.dataset
        assert told.beside is not None
        assert found.crossing is not None
        prompts = {
            int(each): (prompt_of(dataset.tokens(int(each))), prompt_of(told.beside.text(int(each))))
            for each in run.planned.samples(0)
        }
        aligned = found.crossing.aligned
        retelling = Retelling(
            found.model.tokenizer,
            found.crossing.tokenizer,
            aligned.vocabulary,
            aligned.record.ends,
            most_tokens=None,
            most_rows=1 << 20,
        )
    written = rollouts(tmp_path)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        for path in (far_bench.student, far_bench.teacher)
    )
    head = Head(teacher.lm_head.weight.detach())
    total, num_aligned = torch.zeros((), dtype=torch.float64), 0
    for each in written:
        own, theirs = prompts[each["sample"]]
        answer = np.array(each["token_ids"], np.int32)
        retold = retelling.told(theirs, answer, ended=each["ended"])
        ids = torch.tensor([*own.tolist(), *answer.tolist()])
        hidden = student.model(ids[None]).last_hidden_state[0, len(own) - 1 : -1]
        others = torch.from_numpy(retold.text.token_ids.astype(np.int64))
        with torch.no_grad():
            rows = teacher.model(others[None]).last_hidden_state[0, len(theirs) - 1 : -1]
        runs = torch.from_numpy(retold.spans.astype(np.int64))
        spans = Spans(
            student=runs[:, :2],
            teacher=runs[:, 2:],
            student_tokens=ids[len(own) :],
            teacher_tokens=others[len(theirs) :],
        )
        total = (
            total
            + reference_across(
                Side(hidden, Head(student.lm_head.weight)),
                Side(rows, head),
                spans,
                None,
                method=align,
                loss=LossSpec(),
                vocabulary=aligned.vocabulary,
            ).loss
        )
        num_aligned += int(runs[:, 1].sum())
    assert sum(len(each["token_ids"]) for each in written) == count
    assert num_aligned == round(share * count) > count // 3
    assert sums["kd"] == pytest.approx(float(total.detach()), rel=1e-4)
    (total / count).backward()
    for name, parameter in student.named_parameters():
        own_gradient = gradients[name].double()
        error = (own_gradient - parameter.grad).norm() / parameter.grad.norm().clamp_min(1e-12)
        assert error < 1e-4, (name, error)


def test_across_tokenizers_a_sample_that_is_cut_at_another_turn_for_the_teacher_is_left_out(
    far_bench: Bench, tmp_path: Path
) -> None:
    """The answers of either side would follow other prompts."""
    turns = [{"role": "user", "content": "What is a row?"}, {"role": "assistant", "content": "A row of text. " * 3}]
    data, cache = tmp_path / "data.jsonl", tmp_path / "cache"
    data.write_text("".join(json.dumps({"messages": turns * count}) + "\n" for count in (1, 2, 3)))
    spec = ExtractSpec(teacher=far_bench.teacher, data=(data,), data_spec=DataSpec(max_length=110))
    extract(spec, cache, Silent())
    training = replace(training_for(far_bench, tmp_path / "out"), caches=(cache,), data=(data,))
    training = replace(training, spec=training.spec.model_copy(update={"data": DataSpec(max_length=300)}))
    run = run_file().model_copy(update={"teacher": TeacherSpec(path=far_bench.teacher)})
    found = find_onpolicy(training, run)
    (teacher,), usable = found.dataset.teachers, found.dataset.usable
    assert teacher.beside is not None
    assert usable is not None
    for sample, kept in enumerate(usable.tolist()):
        texts = found.dataset.tokens(sample), teacher.beside.text(sample)
        runs = [int((np.diff(text.supervised.astype(int), prepend=0) == 1).sum()) for text in texts]
        assert (runs[0] == runs[1]) == kept
    assert 0 < usable.sum() < 3
    assert any(f"{int((~usable).sum())} samples are cut at another turn" in note for note in found.notes)
    assert sorted(np.concatenate(found.samples).tolist()) == np.flatnonzero(usable).tolist()


def test_across_tokenizers_what_is_made_of_one_tokenizer_is_refused(far_bench: Bench, tmp_path: Path) -> None:
    training = replace(training_for(far_bench, tmp_path), data=(far_bench.data,))
    for live, words in (
        ({"tee": tmp_path / "kept"}, r"live\.tee: .*rollouts-\*\.jsonl will have the answers as text"),
        ({"teacher_update_every": 2}, r"live\.teacher_update_every: .*has its tokenizer"),
    ):
        with pytest.raises(ConfigError, match=words):
            find_onpolicy(training, run_file(**live))


def test_older_answers_are_weighed_by_what_the_student_thinks_of_them_now(bench: Bench, tmp_path: Path) -> None:
    """Loss and gradients by autograd through dense logits; the data's answers beside them have weight 1."""
    cap, temperature = 1.2, 0.8
    training = training_for(bench, tmp_path, loss=REVERSE, grad_accum=2, lr=3e-2, max_steps=2)
    run_spec = run_file(lmbda=0.6, overlap=1, temperature=temperature, importance_cap=cap)
    with beside(bench, training, run_spec) as found, joined(torch.device("cpu")) as ranks:
        run = Run(training, found, ranks)
        run.trainer.step()
        assert not any(name.startswith("importance/") for name in run.batches.told(0)), "all of its answers are fresh"
        count = run.batches.num_supervised(1)
        sums = run.trainer.backward(1, count)
        told = run.batches.told(1)
        parameters = list(run.student.model.named_parameters())
        gradients = {name: parameter.grad.full_tensor() for name, parameter in parameters}
        state = {name: parameter.detach().full_tensor() for name, parameter in parameters}
        texts = {int(each): found.dataset.tokens(int(each)) for each in run.planned.samples(1)}
    written = [each for each in rollouts(tmp_path) if each["step"] == 1]
    assert {each["version"] for each in written} == {0}
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (bench.student, bench.teacher)
    )
    student.load_state_dict(state, strict=False)
    size = found.dataset.teachers[0].record.vocab_size
    answered = {each["sample"] for each in written}
    asked = [([*prompt_of(texts[each["sample"]]).tolist(), *each["token_ids"]], each["logprobs"]) for each in written]
    own = [(torch.tensor(ids), torch.arange(len(ids)) >= len(ids) - len(old), old) for ids, old in asked]
    data = [
        (torch.tensor(text.token_ids.astype(np.int64)), torch.from_numpy(text.supervised), None)
        for sample, text in texts.items()
        if sample not in answered
    ]
    assert own
    assert data
    total, weights = torch.zeros((), dtype=torch.float64), []
    for ids, supervised, old in own + data:
        rows, tokens = supervised[1:].nonzero()[:, 0], ids[1:][supervised[1:]]
        logits = student(ids[None]).logits[0, rows, :size].double()
        with torch.no_grad():
            theirs = teacher(ids[None]).logits[0, rows, :size].double().log_softmax(-1)
            now = (logits / temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        weight = torch.ones(len(rows)) if old is None else (now - torch.tensor(old)).exp().clamp_max(cap)
        weights += weight.tolist() if old else []
        ours = logits.log_softmax(-1)
        total = total + (weight * (ours.exp() * (ours - theirs)).sum(-1)).sum()
    assert sums["kd"] == pytest.approx(float(total.detach()), rel=1e-5)
    assert told["importance/mean"] == pytest.approx(np.mean(weights), rel=1e-5)
    assert told["importance/max"] == pytest.approx(max(weights), rel=1e-5) == pytest.approx(cap)
    assert told["importance/clip_ratio"] == pytest.approx(np.mean(np.array(weights) >= cap))
    assert 0.05 < told["importance/clip_ratio"] < 0.95, "the test needs both"
    (total / count).backward()
    for name, parameter in student.named_parameters():
        error = (gradients[name] - parameter.grad).norm() / parameter.grad.norm().clamp_min(1e-12)
        assert error < 1e-4, (name, error)


def test_a_pass_in_bfloat16_weighs_by_the_log_probabilities_that_were_written(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, weigh = [], Importance.weights

    def seen(self: Importance, student: Side, tokens: Tensor, rows: Tensor, written: Tensor, vocab_size: int) -> Tensor:
        taken.extend(written.tolist())
        return weigh(self, student, tokens, rows, written, vocab_size)

    monkeypatch.setattr(Importance, "weights", seen)
    training = training_for(bench, tmp_path, loss=REVERSE, max_steps=2, dtype="bfloat16")
    trained(bench, training, run_file(overlap=1, importance_cap=2.0))
    expected = [number for each in rollouts(tmp_path) if each["step"] == 1 for number in each["logprobs"]]
    assert sorted(taken) == sorted(np.float32(expected).tolist())
    assert taken


def test_answers_of_the_weights_of_now_count_as_without_importance(bench: Bench, tmp_path: Path) -> None:
    for name, cap in (("without", None), ("with", 1e-3)):
        trained(
            bench,
            training_for(bench, tmp_path / name, loss=REVERSE, max_steps=1),
            run_file(overlap=1, importance_cap=cap),
        )
    assert weights(tmp_path / "with") == weights(tmp_path / "without")


def test_a_run_that_is_stopped_goes_on_with_the_answers_it_had_written(bench: Bench, tmp_path: Path) -> None:
    """Two steps ahead, so that answers of older weights are waiting when it is stopped, and weighed then."""
    run = run_file(overlap=2, lmbda=0.7, importance_cap=2.0)
    changes = {"max_steps": 9, "save_every": 2}
    whole = trained(bench, training_for(bench, tmp_path / "whole", loss=REVERSE, **changes), run)
    assert [step["staleness/max"] for step in of(whole, "step")] == [0, 1, 2, 2, 2, 2, 2, 2, 2]
    assert all(step["importance/mean"] != 1.0 for step in of(whole, "step")[1:])

    class Stopped(Recorder):
        def event(self, kind: str, **fields: object) -> None:
            super().event(kind, **fields)
            if kind == "step" and fields["step"] == 5:
                raise KeyboardInterrupt

    stopped = training_for(bench, tmp_path / "stopped", loss=REVERSE, **changes)
    with pytest.raises((KeyboardInterrupt, TemporaryError)):
        trained(bench, stopped, run, Stopped())
    log = tmp_path / "stopped" / "rollouts-00000.jsonl"
    with open(log, "a") as file:
        file.write('{"step": 8, "torn')
    again = trained(bench, stopped, run)
    assert of(again, "resume")
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")
    assert log.read_bytes() == (tmp_path / "whole" / "rollouts-00000.jsonl").read_bytes()


def test_an_answer_that_was_cut_has_a_row_for_each_token_and_no_end(bench: Bench, tmp_path: Path) -> None:
    training = training_for(bench, tmp_path, max_steps=1)
    recorder = trained(bench, training, run_file(max_new_tokens=3))
    (step,), written = of(recorder, "step"), [each for each in rollouts(tmp_path) if each["step"] == 0]
    assert step["num_supervised"] == sum(len(each["token_ids"]) for each in written)
    assert step["response_length/max"] == 3
    cut = [each for each in written if not each["ended"]]
    assert step["response_length/clip_ratio"] == pytest.approx(len(cut) / len(written))
    assert all(len(each["token_ids"]) == 3 for each in cut)


def test_an_answer_that_was_cut_is_left_out_where_that_is_asked_for(bench: Bench, tmp_path: Path) -> None:
    """It is counted and read by people like the others; the ones that ended are trained on."""
    recorder = trained(bench, training_for(bench, tmp_path, max_steps=2), run_file(truncated="drop", max_new_tokens=30))
    written = rollouts(tmp_path)
    assert 0 < sum(each["ended"] for each in written) < len(written), "the test needs both"
    for number, step in enumerate(of(recorder, "step")):
        mine = [each for each in written if each["step"] == number]
        cut = [each for each in mine if not each["ended"]]
        assert step["rollout/num_answers"] == len(mine)
        assert step["rollout/num_dropped"] == len(cut)
        assert step["response_length/clip_ratio"] == pytest.approx(len(cut) / len(mine))
        assert step["num_supervised"] == sum(len(each["token_ids"]) for each in mine if each["ended"])


def test_a_step_whose_answers_are_all_left_out_changes_nothing(bench: Bench, tmp_path: Path) -> None:
    """Neither by momentum nor by weight decay: between steps of one sample each that learn from the data's answers."""
    training = training_for(bench, tmp_path, batch_tokens=1, weight_decay=0.5, max_steps=8)
    run_spec = run_file(truncated="drop", max_new_tokens=1, lmbda=0.5)
    with beside(bench, training, run_spec) as found, joined(torch.device("cpu")) as ranks:
        run = Run(training, found, ranks)
        steps, unchanged = [], []
        for _ in range(8):
            before = {name: tensor.clone() for name, tensor in run.trainer.state().items()}
            steps.append(run.trainer.step())
            unchanged.append(all(torch.equal(before[name], now) for name, now in run.trainer.state().items()))
    empty = [step["num_supervised"] == 0 for step in steps]
    assert False in empty[: empty.index(True)], "the test needs moments that are not zero before"
    assert unchanged == empty
    assert steps[-1]["num_skipped"] == sum(empty)
    assert all(step["loss/mean"] == step["grad_norm"] == 0.0 for step in np.array(steps)[empty])


def test_an_answer_that_is_too_old_when_its_turn_comes_is_left_out(bench: Bench, tmp_path: Path) -> None:
    """The bound is smaller than what is written ahead; a command refuses that, an older run's files may hold it."""
    recorder = trained(bench, training_for(bench, tmp_path, max_steps=4), run_file(overlap=2, max_staleness=1))
    steps = of(recorder, "step")
    assert [step["staleness/max"] for step in steps] == [0, 1, 0, 0]
    assert all(step["staleness/dropped"] == 0 < step["num_supervised"] for step in steps[:2])
    for step in steps[2:]:
        assert step["staleness/dropped"] == step["rollout/num_answers"] > 0
        assert step["rollout/num_dropped"] == step["num_supervised"] == 0


def test_cross_entropy_is_taken_on_the_datas_answers_alone(bench: Bench, tmp_path: Path) -> None:
    mixed = LossSpec(divergence="reverse_kl", kd_weight=0.25)
    own = trained(bench, training_for(bench, tmp_path / "own", max_steps=2, loss=mixed), run_file())
    for step in of(own, "step"):
        assert step["ce/mean"] == 0.0
        assert step["loss/mean"] == pytest.approx(0.25 * step["kd/mean"])
    both = trained(bench, training_for(bench, tmp_path / "both", max_steps=2, loss=mixed), run_file(lmbda=0.5))
    assert all(step["ce/mean"] > 0.0 for step in of(both, "step"))


def test_rows_that_a_cache_has_are_not_asked_of_the_teacher(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdpipe.stages.live import answers

    wanted: list[int] = []
    own = answers.RingRows.want
    monkeypatch.setattr(
        answers.RingRows, "want", lambda self, samples: (wanted.extend(samples.tolist()), own(self, samples))
    )
    students = []
    for name, cache in (("ring", ()), ("cache", (bench.cache,))):
        wanted.clear()
        trained(bench, training_for(bench, tmp_path / name, max_steps=4), run_file(lmbda=0.5, cache=cache))
        assert any(each < 60 for each in wanted) == (name == "ring")
        assert any(each >= 60 for each in wanted)
        students.append(weights(tmp_path / name))
    assert students[0] == students[1]


def test_a_cache_of_another_teacher_is_refused(bench: Bench, families: dict[str, Bench], tmp_path: Path) -> None:
    training = training_for(bench, tmp_path / "out")
    other = next(iter(families.values())).cache
    with (
        pytest.raises(CacheError, match="is not that of --teacher"),
        pytest.raises(TemporaryError),
        beside(bench, training, run_file(cache=(other,))),
    ):
        pass


@pytest.mark.parametrize(
    ("live", "error", "says"),
    [({"max_new_tokens": 4096}, ConfigError, "the student reads"), ({}, None, "")],
)
def test_a_prompt_and_its_longest_answer_must_fit(
    bench: Bench, tmp_path: Path, live: dict, error: type[Exception] | None, says: str
) -> None:
    found = find_onpolicy(training_for(bench, tmp_path), run_file(**live))
    if error is None:
        check_prompts(found, run_file(**live).live)
    else:
        with pytest.raises(error, match=says):
            check_prompts(found, run_file(**live).live)
