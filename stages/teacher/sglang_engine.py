"""The teacher in SGLang: prompts of ids go to a host process, rows come straight into the shard's mapped file.

    extraction --prompts--> host (host.py) --> schedulers --rows--> the shard's file
               <--answers--                       <-- receipts, log-probabilities

A prompt ends at the last row that is kept: a causal model needs nothing after it, and the log-probability of the next
token comes from the one place where SGLang makes logits anyway. For other probed rows, of one sample in PROBE_EVERY, a
shorter prompt is sent as well, whose last row the gate compares: scoring a whole prompt would cost the head on each of
its tokens.
Invariant: acks come in the order of the requests, each with the receipt of the sink; a silent, dead or confused engine
is an error that names the request, never a wait without end.
Cost: about 15 s to start on a CPU; then SGLang's own prefill. Measured by tools/bench/sglang_sink.py.
"""

# Shapes: n tokens of one sample, R rows kept of it, K rows probed, E teacher width.

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from kdpipe.manifests.engine import EngineOptions
from kdpipe.manifests.errors import EngineError, GateError
from kdpipe.manifests.specs import SHARD_TOKENS, Device, Dtype
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.models.head import Head
from kdpipe.stages.rows import TORCH_DTYPES, checksum
from kdpipe.stages.sglang.arguments import check_options, server_arguments
from kdpipe.stages.sglang.host import Failed
from kdpipe.stages.sglang.prefill import ARGUMENTS, Answer, Key, Prompt
from kdpipe.stages.sglang.process import SglangProcess
from kdpipe.stages.sglang.sink import Order, Receipt, runs_of
from kdpipe.stages.sglang.version import sglang_version
from kdpipe.stages.teacher.canary import compare_rows
from kdpipe.stages.teacher.describe import TeacherInfo, describe_teacher
from kdpipe.stages.teacher.engine import Ack, Canary, Determinism, Request
from kdpipe.stages.teacher.transformers_engine import TransformersEngine

PROBE_EVERY = 128
IN_FLIGHT_TOKENS = 2 * SHARD_TOKENS
"""Tokens given to SGLang and not yet answered: it works on while a whole shard is sealed."""


class SglangTeacher:
    """TeacherEngine over sglang.Engine in a process of its own, started by the first use."""

    batches_itself = True
    probe_every = PROBE_EVERY

    def __init__(self, folder: ModelFolder, *, dtype: Dtype, device: Device, options: EngineOptions) -> None:
        """Nothing is started yet. Raises ConfigError for a version or options that cannot be."""
        self.version()
        folder.require_no_adapter("SGLang")
        self.notes: list[str] = []
        self._folder, self._dtype, self._device, self._options = folder, dtype, device, options
        self._info = describe_teacher(folder, dtype)
        arguments = server_arguments(folder.place, self._dtype, self._info.max_positions, device, options, ARGUMENTS)
        self.process = SglangProcess(folder.path, arguments, device, options)
        self._run = 0

    @classmethod
    def version(cls) -> str:
        """Raises ConfigError where SGLang is absent or was not tried."""
        return sglang_version()

    @classmethod
    def determinism(cls, device: Device, options: EngineOptions) -> Determinism:
        """As its deterministic mode is asked for. Raises ConfigError for options that SGLang cannot have."""
        check_options(options, device)
        return "bitwise" if options.deterministic else "tolerance"

    def canary(self, head: Head, samples: Sequence[np.ndarray]) -> Canary:
        """Start SGLang and compare its rows with transformers' own; see TeacherEngine.canary."""
        if self._device == "cpu":
            self.process.launch()  # it starts while transformers runs; on a GPU each wants the memory for itself
        logit_error, reference = self._reference(head, samples)
        rows = self._canary_rows(samples)
        if reference is None:
            return Canary(logit_error=float("nan"), row_error=float("nan"), skipped="no room to load it twice")
        error = compare_rows(
            rows, reference, dtype=self._dtype, exact=self._options.quantization is None, path=self._folder.path
        )
        return Canary(logit_error=logit_error, row_error=error)

    def run(self, batches: Iterable[Sequence[Request]]) -> Iterator[Ack]:
        """Run the batches; see TeacherEngine.run. SGLang batches by itself: a planned batch is only sent together."""
        self.process.start()
        self._run += 1  # answers to a run that was given up may still be on their way
        self.process.advice = "finished shards are kept, run the same command again"
        probes = ProbeFile(self.process.folder / f"probes-{self._run}")
        ahead = iter(batches)
        waiting: deque[Request] = deque()
        answers: dict[Key, Answer] = {}
        tokens, exhausted = 0, False
        while True:
            while tokens < IN_FLIGHT_TOKENS and not exhausted:
                batch = next(ahead, None)
                exhausted = batch is None
                if not batch and waiting:
                    break
                waiting.extend(batch or ())
                tokens += sum(len(request.token_ids) for request in batch or ())
                prompts = [
                    prompt for each in batch or () for prompt in prompts_of(self._run, each, self._dtype, probes)
                ]
                self._send(prompts)
            if not waiting:
                return
            keys = keys_of(self._run, waiting[0])
            while not all(key in answers for key in keys):
                answer = self._receive(waiting, answers)
                if answer.key[0] == self._run:
                    answers[answer.key] = answer
            request = waiting.popleft()
            tokens -= len(request.token_ids)
            yield ack_of(request, [answers.pop(key) for key in keys], probes)

    def close(self) -> None:
        """End SGLang and everything it started."""
        self.process.end()

    def _send(self, prompts: list[Prompt]) -> None:
        self.process.send(prompts, f"sample {prompts[0].key[1]}" if prompts else "")

    def _receive(self, waiting: Iterable[Request], answers: Mapping[Key, Answer]) -> Answer:
        """The next answer. Raises EngineError naming the oldest request that has none."""

        def who() -> str:
            pending = [{key[1] for key in keys_of(self._run, request) if key not in answers} for request in waiting]
            late = [sample for samples in pending for sample in samples]
            return f"sample {late[0]} and {len(late) - 1} more"

        message = self.process.receive(self._options.timeout_s, who)
        while isinstance(message, Failed) and message.number != self._run:
            message = self.process.receive(self._options.timeout_s, who)
        if isinstance(message, Failed):
            raise GateError(f"SGLang refused a request: {message.message}", where=who())
        assert isinstance(message, Answer)
        return message

    def _reference(self, head: Head, samples: Sequence[np.ndarray]) -> tuple[float, list[torch.Tensor] | None]:
        """The error of the head's formula, and transformers' own rows [n, E]; None without room to load it."""
        if self._options.tp * self._options.pp > 1 and self._device == "cuda":
            device: Device = "cpu"  # it did not fit on one GPU
        else:
            device = self._device
        if not has_room(self._info, device):
            return float("nan"), None
        engine = TransformersEngine(self._folder, dtype=self._dtype, device=device)
        try:
            error = engine.canary(head, samples).logit_error
            return error, [engine.rows_and_logits(token_ids)[0].cpu() for token_ids in samples]
        finally:
            engine.close()

    def _canary_rows(self, samples: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Rows [n, E] of whole samples, through the sink into a scratch file. Raises GateError without a receipt."""
        self.process.start()
        dtype = TORCH_DTYPES[self._dtype]
        total = sum(len(token_ids) for token_ids in samples)
        path = self.process.folder / "canary"
        size = total * self._info.hidden_size
        rows = torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(total, -1)
        rows.fill_(torch.nan)
        first = np.cumsum([0, *(len(token_ids) for token_ids in samples)])
        self._send(
            [
                Prompt(
                    key=(0, number, len(token_ids) - 1),
                    token_ids=token_ids,
                    order=Order(
                        path=str(path),
                        offset=int(first[number]) * self._info.hidden_size * dtype.itemsize,
                        width=self._info.hidden_size,
                        dtype=self._dtype,
                        runs=(0, len(token_ids)),
                    ),
                    scored=(0,),
                )
                for number, token_ids in enumerate(samples)
            ]
        )
        for _ in samples:
            try:
                message = self.process.receive(self._options.timeout_s, lambda: "the canary samples")
            except EngineError as err:
                raise self.process.never_ran("on the first few samples", err) from None
            if isinstance(message, Failed):
                raise GateError(f"SGLang refused a request: {message.message}", where="the canary")
            assert isinstance(message, Answer)
            require_receipt(message, len(samples[message.key[1]]), where="the canary")
        return list(rows.split([len(token_ids) for token_ids in samples]))


def keys_of(run: int, request: Request) -> list[Key]:
    """Of the prompts that a request becomes: one up to each probed row, the last of which goes up to its last row."""
    return [(run, request.sample, int(position)) for position in request.positions[request.probes]]


class ProbeFile:
    """Where the last rows of shorter prompts land: a sparse file with a place for each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[Key, int] = {}
        self._end = 0
        path.touch()

    def order(self, key: Key, width: int, dtype: Dtype) -> Order:
        """The order that writes a prompt's last row to a place of its own."""
        self._places[key] = self._end
        self._end += width * TORCH_DTYPES[dtype].itemsize
        return Order(path=str(self.path), offset=self._places[key], width=width, dtype=dtype, runs=(key[2], key[2] + 1))

    def row(self, key: Key, like: np.ndarray) -> np.ndarray:
        """The row [E] of a prompt that was answered, in the dtype of `like` [R, E]."""
        return np.fromfile(self.path, like.dtype, like.shape[1], offset=self._places.pop(key))


def prompts_of(run: int, request: Request, dtype: Dtype, probes: ProbeFile) -> list[Prompt]:
    """The request as SGLang gets it: cut after its last kept row, and once more after each other probed row."""
    width = request.target.array.shape[1]
    prompts = []
    for key, scored in zip(keys_of(run, request), request.scored, strict=True):
        order = probes.order(key, width, dtype)
        if key[2] == request.positions[-1]:
            path, offset, runs = str(request.target.path), request.target.offset, runs_of(request.positions)
            order = Order(path=path, offset=offset, width=width, dtype=dtype, runs=runs)
        ids = request.token_ids[: key[2] + 1]
        prompts.append(Prompt(key=key, token_ids=ids, order=order, scored=tuple(scored.tolist())))
    return prompts


def ack_of(request: Request, answers: Sequence[Answer], probes: ProbeFile) -> Ack:
    """What the gate is told, of the answers to keys_of; a request without rows was never sent.

    Raises GateError where the sink did not write what was ordered.
    """
    array = request.target.array
    receipt = Receipt(num_positions=0, num_rows=0, num_bytes=0, checksum=checksum(array[:0]))
    for answer in answers:
        where = f"sample {request.sample}"
        receipt = require_receipt(answer, answer.key[2] + 1, where=where)
        planned = array.nbytes if answer is answers[-1] else array[:1].nbytes
        if receipt.num_bytes != planned:
            raise GateError(
                f"{planned} bytes of rows were ordered, the engine wrote {receipt.num_bytes}; "
                "does it compute in another dtype?",
                where=where,
            )
    return Ack(
        sample=request.sample,
        num_rows=receipt.num_rows,
        checksum=receipt.checksum,
        probe_rows=np.stack([*(probes.row(answer.key, array) for answer in answers[:-1]), array[-1]])
        if answers
        else None,
        probe_logprobs=np.array([answer.logprobs for answer in answers], np.float32).reshape(request.scored.shape),
    )


def require_receipt(answer: Answer, num_positions: int, *, where: str) -> Receipt:
    """The sink's receipt, of the whole prompt. Raises GateError where there is none."""
    if answer.receipt is None:
        raise GateError(
            "SGLang answered without the sink's receipt, so no row was written; is another plugin in its way? "
            "(entry points sglang.srt.plugins, variable SGLANG_PLUGINS)",
            where=where,
        )
    receipt = Receipt.from_floats(answer.receipt)
    if receipt.num_positions != num_positions:
        raise GateError(
            f"the prompt has {num_positions} tokens, {receipt.num_positions} hidden states came by", where=where
        )
    return receipt


def has_room(info: TeacherInfo, device: Device) -> bool:
    """Whether transformers can load the teacher too, for a moment, with a fifth to spare."""
    needed = info.num_params * TORCH_DTYPES[info.dtype].itemsize * 1.2
    if device == "cuda":
        return bool(needed < torch.cuda.mem_get_info()[0])
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    return needed < available
