"""A plugin for SGLang that makes it lie, die or hang: put this folder on PYTHONPATH, and KDPIPE_FAULT names a file.

The file's text is the fault, read anew for every batch; an absent or empty file is none. The faults are done inside the
engine, to a batch and its hidden states, before the method is called that the sink goes around.
"""

import os
import signal
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

PROCESSOR = "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor."


def fault() -> str:
    path = Path(os.environ["KDPIPE_FAULT"])
    return path.read_text().strip() if path.exists() else ""


def rank() -> int:
    """Of this scheduler in its tensor-parallel group."""
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().attn_tp_rank)


def on_batch(processor: Any, batch: Any, result: Any) -> None:
    """Before the results of a prefill are handed out."""
    name, hidden = fault(), getattr(result.logits_output, "hidden_states", None)
    if name == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "hang":
        time.sleep(3600)
    if hidden is None:
        return
    if name == "drop":
        result.extend_input_len_per_req = [length - 1 for length in result.extend_input_len_per_req]
    if name == "silent":
        for request in batch.reqs:
            request.sampling_params.custom_params = None
    if name == "second rank" and rank() > 0:
        hidden.zero_()
    if name == "nan":
        hidden[len(hidden) // 2, 3] = float("nan")
    if name == "shift":
        hidden.copy_(hidden.roll(1, 0))
    if name == "swap":
        at = 0
        for first, second in pairwise(result.extend_input_len_per_req):
            if first == second:
                hidden[at : at + 2 * first].copy_(hidden[at : at + 2 * first].roll(first, 0))
                break
            at += first


def register() -> None:
    if "KDPIPE_FAULT" not in os.environ:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from kdpipe.stages.sglang import sink, weights

    HookRegistry.register(PROCESSOR + "process_batch_result_prefill", on_batch, HookType.BEFORE)
    own = sink.write_all

    def misplaced(descriptor: int, data: memoryview, offset: int) -> None:
        own(descriptor, data, offset + 4 * (fault() == "misplace"))

    sink.write_all = misplaced
    load, load_bucket = weights.load, weights._load

    def not_loaded(model: Any, named_tensors: Any) -> None:
        if fault() != "skip":
            load(model, named_tensors)

    def misled(model: Any, asked: dict[str, Any]) -> str:
        if fault() == "lose a tensor":
            asked["places"] = asked["places"][:-1]
        return load_bucket(Lying(model), asked)

    weights.load, weights._load = not_loaded, misled


class Lying:
    """A model of SGLang's that does not do what it says with the tensors it is given."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.parameters, self.named_parameters = model.parameters, model.named_parameters

    def load_weights(self, tensors: Iterable[Any]) -> None:
        given = list(tensors)
        if fault() == "ignore":
            return
        self._model.load_weights(given[: -1 if fault() == "drop a name" else None])
        if fault() == "flip":
            *_, last = self._model.parameters()
            last.data[:1].view(torch.int32).bitwise_xor_(1 << 29)  # of the exponent: 1.0 becomes 2**-64
