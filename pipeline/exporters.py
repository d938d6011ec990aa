"""Exporters: a run's events for TensorBoard and Weights & Biases too, as they go into events.jsonl.

    EventLog -> Exporters.take -> TensorBoard | Wandb

Invariant: one that fails is given up and said once; it is never an error of the run, and nothing of the run's result.
"""

import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.provenance import digest_json
from kdpipe.manifests.run import TENSORBOARD, WANDB

Event = Mapping[str, Any]
FLUSH_S = 10
"""Longest time that a figure is kept in memory."""
START_S, FINISH_S = 60.0, 120.0
"""Longest waits for Weights & Biases, where it is online."""
KINDS = {"step": "train", "eval": "eval"}
"""Events that have figures, and what goes before these in a name: train/loss/mean, eval/heldout_kl."""


class Exporter(Protocol):
    """Takes events in the order of events.jsonl, from the first that a session writes there."""

    def take(self, event: Event) -> None: ...

    def close(self) -> None: ...


class Exporters:
    """Those of a run; none of them can end it.

    problems: what went wrong, for a person, until it is said
    """

    def __init__(self, names: Sequence[str], output: Path) -> None:
        self.problems: list[str] = []
        self._all: dict[str, Exporter] = {}
        for name in names:
            self._try(name, partial(self._open, name, output))

    def take(self, line: str) -> None:
        """An event as it stands in the file."""
        if self._all:
            event = json.loads(line)
            for name, exporter in list(self._all.items()):
                self._try(name, partial(exporter.take, event))

    def close(self) -> None:
        for name, exporter in list(self._all.items()):
            self._try(name, exporter.close)
        self._all.clear()

    def _open(self, name: str, output: Path) -> None:
        self._all[name] = EXPORTERS[name](output)

    def _try(self, name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as err:  # whatever a library of others raises, the run goes on
            self._all.pop(name, None)
            reason = " ".join(str(err).split()) or type(err).__name__
            self.problems.append(f"{name}: {reason}; the run goes on without it, its events are in events.jsonl")


class TensorBoard:
    """Scalars by step in OUTPUT/tensorboard: `tensorboard --logdir` of a folder of runs shows all of them."""

    def __init__(self, output: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._open = lambda purge: SummaryWriter(str(output / TENSORBOARD), purge_step=purge, flush_secs=FLUSH_S)
        self._writer: Any = None

    def take(self, event: Event) -> None:
        if event["kind"] == "start" and self._writer is None:
            self._writer = self._open(event["first_step"])  # what an interrupted session wrote from there on is void
        for name, value in figures(event).items():
            self._writer = self._writer or self._open(None)
            self._writer.add_scalar(name, value, event["step"], walltime=event["time"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Wandb:
    """A run of Weights & Biases of the output's name; its sessions are one run there.

    Offline, in OUTPUT/wandb, unless WANDB_MODE says otherwise or there is a WANDB_API_KEY: `wandb sync` uploads it.
    """

    def __init__(self, output: Path) -> None:
        import wandb

        self._wandb: Any = wandb
        self._output = output
        self._run: Any = None
        self._inputs: Mapping[str, Any] = {}

    def take(self, event: Event) -> None:
        if event["kind"] == "accepted":
            self._inputs = event.get("inputs") or {}
        elif found := figures(event):
            self._begin()
            self._run.log(found | {"step": event["step"]})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()

    def _begin(self) -> None:
        if self._run is not None:
            return
        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "kdpipe"),
            name=self._output.name,
            # One run however often it was interrupted, another one where its inputs are others.
            id=digest_json([str(self._output.absolute()), self._inputs])[:16],
            resume="allow",
            dir=str(self._output),
            config=dict(self._inputs),
            mode=mode,
            settings=self._wandb.Settings(
                console="off", silent=True, disable_git=True, init_timeout=START_S, finish_timeout=FINISH_S
            ),
        )
        self._run.define_metric("*", step_metric="step")  # a step that is made again after a resume is no error then


EXPORTERS: Mapping[str, Callable[[Path], Exporter]] = {TENSORBOARD: TensorBoard, WANDB: Wandb}


def figures(event: Event) -> dict[str, float]:
    """What of an event is drawn by its step: {"train/loss/mean": 2.3, ...}; {} of another kind."""
    prefix = KINDS.get(str(event["kind"]))
    if prefix is None:
        return {}
    return {
        f"{prefix}/{key}": value
        for key, value in event.items()
        if key not in ("time", "step") and isinstance(value, int | float) and not isinstance(value, bool)
    }


def require_installed(names: Sequence[str]) -> None:
    """Raises ConfigError where what an exporter needs is not installed: said before a run, not after a night."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"{name} is not installed: pip install 'kdpipe[{name}]', or leave it out: events.jsonl has all of it, "
                "and kdpipe report draws it",
                where="train.loggers",
            )
