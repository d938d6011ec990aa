"""A plugin for SGLang that makes it lie, die or hang: put this folder on PYTHONPATH, and KDPIPE_FAULT names a file.

The file's text is the fault, read anew for every batch; an absent or empty file is none. The faults are done inside the
engine, to a batch and its hidden states, before the method is called that the sink goes around.
"""

import os
import signal
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

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

    from kdpipe.stages.sglang import sink

    HookRegistry.register(PROCESSOR + "process_batch_result_prefill", on_batch, HookType.BEFORE)
    own = sink.write_all

    def misplaced(descriptor: int, data: memoryview, offset: int) -> None:
        own(descriptor, data, offset + 4 * (fault() == "misplace"))

    sink.write_all = misplaced
