"""Keys of an on-policy run: what they imply for each other, and which contradict."""

from pathlib import Path

from kdpipe.manifests.errors import ConfigError, StudentError, TeacherError
from kdpipe.manifests.specs import LiveSpec, LossSpec, RunFile

OWN = Path("student")
"""As --teacher: the student itself, as it is at the start."""


def settled(run: RunFile) -> RunFile:
    """With what its keys imply for each other. Raises ConfigError for those that contradict."""
    run = of_own(run)
    _check_updates(run.live, run.cache.path)
    live, loss = run.live, run.loss
    if live.overlap > live.staleness_bound:
        raise ConfigError(
            f"answers are {live.overlap} optimizer steps old when they are trained on, live.max_staleness allows "
            f"{live.staleness_bound}: all would be dropped; lower the one or raise the other",
            where="live.overlap",
        )
    if live.importance_cap is not None:
        _check_importance(live)
    if live.beta is not None:
        if loss.divergence != "jsd" and "divergence" in loss.model_fields_set:
            raise ConfigError(
                f"beta is that of the divergence jsd, loss.divergence is {loss.divergence}; leave one of them out",
                where="live.beta",
            )
        given = loss.model_dump(exclude_unset=True, exclude={"preset"} if loss.preset is None else set())
        loss = LossSpec.model_validate(given | {"divergence": "jsd", "options": {"beta": live.beta}})
    if loss.kd_weight == 0.0:
        raise ConfigError(
            "0 leaves nothing to learn from the teacher; kdpipe train --data learns from the data's answers alone",
            where="loss.kd_weight",
        )
    if live.seq_kd and run.cache.path:
        raise ConfigError(
            "with --seq-kd the teacher's answers take the place of those whose rows it has; leave one of them out",
            where="--cache",
        )
    if live.temperature == 0.0 and live.samples_per_prompt > 1:
        raise ConfigError(
            f"temperature 0 writes the same answer {live.samples_per_prompt} times", where="live.samples_per_prompt"
        )
    return run.model_copy(update={"loss": loss})


def of_own(run: RunFile) -> RunFile:
    """With the student's folder as the teacher's, where the word for it is given and is no folder."""
    if run.teacher.path != OWN or OWN.exists():
        return run
    trust = run.teacher.trust_remote_code or run.student.trust_remote_code
    teacher = run.teacher.model_copy(update={"path": run.student.path, "trust_remote_code": trust})
    return run.model_copy(update={"teacher": teacher})


def require_same_model(run: RunFile) -> None:
    """Where the teacher is made of the student, their models must be alike. Raises ConfigError, StudentError, ..."""
    if run.live.teacher_update_every is None:
        return
    from kdpipe.stages.live import updates
    from kdpipe.stages.models.folder import ModelFolder

    assert run.student.path is not None, "RunCommand has asked for it"
    assert run.teacher.path is not None, "RunCommand has asked for it"
    updates.require_same_model(
        ModelFolder(run.student.path, StudentError, run.student.trust_remote_code),
        ModelFolder(run.teacher.path, TeacherError, run.teacher.trust_remote_code),
    )


def _check_updates(live: LiveSpec, caches: tuple[Path, ...]) -> None:
    """Raises ConfigError for what a teacher that is made anew cannot go with."""
    if live.teacher_update_every is None:
        if live.ema:
            raise ConfigError(
                "nothing makes the teacher anew; say how often with --teacher-update-every, or leave it out",
                where="live.ema",
            )
        return
    for key, given, why in (
        (
            "live.overlap",
            live.overlap,
            "answers written ahead would have the rows of one teacher and the head of another",
        ),
        ("cache.path", caches, "its rows are those of the teacher at the start"),
        ("live.tee", live.tee, "a cache has the rows of one teacher"),
    ):
        if given:
            raise ConfigError(f"{why}; leave it out, or live.teacher_update_every", where=key)


def _check_importance(live: LiveSpec) -> None:
    """Raises ConfigError where importance weights would be none, or all 1."""
    if live.temperature == 0.0:
        raise ConfigError(
            "temperature 0 takes the most likely token, it draws none by a probability that could be compared; leave "
            "it out, or raise live.temperature",
            where="live.importance_cap",
        )
    if not live.overlap:
        raise ConfigError(
            "live.overlap 0 trains on every answer with the weights that wrote it, so all weights would be 1; leave it "
            "out, or set live.overlap",
            where="live.importance_cap",
        )
