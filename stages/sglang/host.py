"""The process that SGLang lives in, and the plugin that SGLang loads.

`main` runs in a process that process.py starts, with a socket between the two. SGLang kills its parent and
everything under it when one of its processes fails; here that is this host, and the process that asked sees a closed
socket instead of its own death. When that process dies, the guard of session.py ends host and engine.
What is asked of the engine is a `Message` of another module (prefill.py, writing.py, weights.py).

The plugin (entry point `sglang.srt.plugins`) puts the sink around the method that turns a prefill's hidden states into
lists of floats. The method is private: `check_target` compares its signature before the engine starts, and a run goes
on only with receipts from the sink. In an engine that the host did not start the plugin does nothing.
Written for SGLang 0.5.23, from its source.
"""

import asyncio
import inspect
import os
import pkgutil
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, Protocol

from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.nearest import nearest
from kdpipe.stages.sglang.session import name_semaphores
from kdpipe.stages.sglang.sink import Order, Sink

SWITCH = "KDPIPE_SINK"
"""Set to 1 by process.py for its own host only: other SGLang engines of the environment stay as they are."""

TARGET = (
    "sglang.srt.managers.scheduler_components.batch_result_processor."
    "SchedulerBatchResultProcessor._append_prefill_hidden_states"
)
SIGNATURE = (
    "self", "req", "logits_output", "hidden_state_offset", "capture_hidden_mode", "extend_input_len", "store",
)  # fmt: skip


class Message(Protocol):
    """Something asked of the engine; it goes to the host as a pickle, what it returns comes back as one.

    number: of the exchange that it belongs to; an answer bears it too, by which late answers are known
    who: what an error names
    """

    @property
    def number(self) -> int: ...

    @property
    def who(self) -> str: ...

    async def ask(self, engine: Any) -> Any:
        """The answer; `engine` is a sglang.Engine, on whose event loop this runs beside other messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """The engine did not start, or a message raised. `option`: the one at fault, where that is known."""

    message: str
    option: str = ""
    number: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """The engine is up."""


def register() -> None:
    """Entry point of the plugin, called by SGLang in each of its processes."""
    if os.environ.get(SWITCH) != "1":
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(TARGET, sink_hook(Sink()), HookType.AROUND)


def sink_hook(sink: Sink) -> Callable[..., int]:
    """The hook around TARGET: the sink takes this request's rows and the batch's offset moves on past them."""

    def hook(
        original: Callable[..., int],
        self: Any,
        *,
        req: Any,
        logits_output: Any,
        hidden_state_offset: int,
        capture_hidden_mode: Any,
        extend_input_len: int,
        store: bool = True,
    ) -> int:
        order = Order.from_params(req.sampling_params.custom_params)
        if order is None or not capture_hidden_mode.is_full():
            return original(
                self,
                req=req,
                logits_output=logits_output,
                hidden_state_offset=hidden_state_offset,
                capture_hidden_mode=capture_hidden_mode,
                extend_input_len=extend_input_len,
                store=store,
            )
        end = hidden_state_offset + extend_input_len
        # `store` is False for every chunk but the last, and for requests that were taken back or ended early.
        middle = not store and req.inflight_middle_chunks > 0 and not req.finished() and not req.is_retracted
        if not (store or middle):
            sink.restart(req.rid)
            return end
        if _is_writer():
            sink.take(req.rid, order, logits_output.hidden_states[hidden_state_offset:end])
        if store:
            # The other ranks of a group hold the same rows and write none; only rank 0 speaks to the client.
            req.hidden_states.append(sink.finish(req.rid).to_floats())
        return end

    return hook


def _is_writer() -> bool:
    """Every rank of a tensor-parallel group holds the same hidden states after the final norm: its first writes."""
    from sglang.srt.runtime_context import get_parallel

    return bool(get_parallel().attn_tp_rank == 0)


def check_target() -> None:
    """The method that the sink goes around must be what this file was written for. Raises ConfigError."""
    owner, _, name = TARGET.rpartition(".")
    found = getattr(pkgutil.resolve_name(owner), name, None)
    signature = () if found is None else tuple(inspect.signature(found).parameters)
    if signature != SIGNATURE:
        got = "is gone" if found is None else f"takes ({', '.join(signature)})"
        raise ConfigError(f"{name} {got}, expected ({', '.join(SIGNATURE)}); this SGLang was changed", where="sglang")


def check_arguments(arguments: dict[str, Any]) -> None:
    """Names of SGLang's own ServerArgs. Raises ConfigError naming the nearest one."""
    from sglang.srt.server_args import ServerArgs

    known = [name for name in ServerArgs.__annotations__ if not name.startswith("_")]
    for name in arguments:
        if name not in known:
            raise ConfigError(f"SGLang has no argument '{name}'{nearest(name, known)}", where="--engine-arg")


def main(descriptor: int) -> None:
    """Serve one engine until the other end of the socket closes."""
    os.set_inheritable(descriptor, False)
    name_semaphores()
    link = Connection(descriptor)
    arguments = link.recv()
    answers: SimpleQueue[Any] = SimpleQueue()
    running: Future[Any] = Future()
    threading.Thread(target=_receive, args=(link, running, answers), daemon=True).start()
    try:
        import sglang

        check_target()
        check_arguments(arguments)
        engine = sglang.Engine(**arguments)
    except ConfigError as err:
        link.send(Failed(message=str(err.args[0]), option=str(err.where)))
        return
    except Exception as err:  # the process boundary: what went wrong is told to the other side, whatever it was
        traceback.print_exc()
        link.send(Failed(message=f"{type(err).__name__}: {err}"))
        return
    link.send(Ready())
    threading.Thread(target=_send, args=(link, answers), daemon=True).start()
    running.set_result(engine)
    engine.loop.run_forever()


def _receive(link: Connection, running: "Future[Any]", answers: "SimpleQueue[Any]") -> None:
    """Messages to the engine's event loop, without ever waiting for it."""
    try:
        while True:
            messages: list[Message] = link.recv()
            engine = running.result()
            for message in messages:
                asyncio.run_coroutine_threadsafe(_ask(engine, message, answers), engine.loop)
    except (EOFError, OSError):
        return  # the other side is gone: session.guard ends this process and all it started


def _send(link: Connection, answers: "SimpleQueue[Any]") -> None:
    """Answers back, in the order in which they came."""
    while True:
        try:
            link.send(answers.get())
        except OSError:
            return  # the other side is gone, which _receive sees too


async def _ask(engine: Any, message: Message, answers: "SimpleQueue[Any]") -> None:
    try:
        answers.put(await message.ask(engine))
    except Exception as err:  # the process boundary again; the failure is the other side's to judge
        traceback.print_exc()
        answers.put(Failed(message=f"{message.who}: {type(err).__name__}: {err}", number=message.number))
