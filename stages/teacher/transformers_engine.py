"""The teacher in this process, by transformers: the reference engine, on CPU or one GPU.

One forward of the causal LM a batch. A hook on the backbone takes its last hidden state (the input of lm_head) and
hands on only the probed rows, so the model's own code after the backbone (lm_head, scale, soft cap) makes logits for
those and for nothing else, whether or not its forward knows `logits_to_keep`.

Invariant: a batch of one runs without padding or mask: its rows are those of `model.model(input_ids)` bit for bit, and
do not depend on what else is in the plan.
Cost: the forward, plus one gather and one copy of the rows; on CUDA the copy of a batch goes on under the next batch.
"""

# Shapes: B requests of a batch, n tokens of the longest, R rows kept, K rows probed, E teacher width, V logits.

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers

from kdpipe.manifests.engine import EngineOptions
from kdpipe.manifests.errors import ConfigError, TeacherError, is_of_others
from kdpipe.manifests.specs import Device, Dtype
from kdpipe.stages.models.backbone import backbone
from kdpipe.stages.models.folder import ModelFolder, in_one_line
from kdpipe.stages.models.head import Head
from kdpipe.stages.rows import TORCH_DTYPES, as_tensor, checksum
from kdpipe.stages.teacher.canary import check_head
from kdpipe.stages.teacher.engine import Ack, Canary, Determinism, Request

# The trial of chunked against whole: tokens, and how far apart rows may be. Measured in bf16: rounding 0.004 to 0.012
# over 18 small architectures, a state lost between chunks 0.18 (Bamba) to 1.1 (RecurrentGemma).
TRIAL_TOKENS = 96
TRIAL_CHUNK = 8
TRIAL_ERROR = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.06}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Span:
    """What one request wants of a stretch of its tokens; columns count from the start of the stretch.

    lo, hi: which of the request's rows lie in it, columns: where
    probes: which of its probes lie in it, probe_columns: where, scored: the ids that are scored at each
    """

    lo: int
    hi: int
    columns: np.ndarray
    probes: np.ndarray
    probe_columns: np.ndarray
    scored: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Piece:
    """Rows and probed log-probabilities of one request out of one forward, on their way to the host.

    lo, hi: which of the request's rows these are; probes: which of its probes
    """

    lo: int
    hi: int
    rows: torch.Tensor
    probes: np.ndarray
    logprobs: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Flight:
    """A batch that was started; `landed` fires when the host has its pieces (None: it has them already)."""

    batch: Sequence[Request]
    pieces: list[list[_Piece]]
    landed: torch.cuda.Event | None


@dataclass(slots=True, eq=False)
class _Chunks:
    """What the chunks of one sample hand on to each other."""

    past: Any = None


class TransformersEngine:
    """TeacherEngine over AutoModelForCausalLM."""

    batches_itself = False
    probe_every = 1

    def __init__(
        self,
        folder: ModelFolder,
        *,
        dtype: Dtype,
        device: Device,
        options: EngineOptions | None = None,
        chunk_tokens: int = 8192,
    ) -> None:
        """Load the teacher; inputs longer than `chunk_tokens` run in chunks through the KV cache.

        options: none of them is of use here; see determinism
        Raises TeacherError for a folder that cannot be loaded whole, or cuda asked for where there is none.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise TeacherError("cuda was asked for and torch sees no GPU; use --device cpu", where=folder.path)
        self.notes: list[str] = []
        self._path = folder.path
        self._device = torch.device(device)
        self._dtype = TORCH_DTYPES[dtype]
        self._chunk_tokens = chunk_tokens
        self._chunks_agree: bool | None = None
        self._pads_agree: bool | None = None
        self._open(folder.load(self._dtype, self._device).eval().requires_grad_(False))

    @classmethod
    def version(cls) -> str:
        return f"transformers {transformers.__version__} torch {torch.__version__}"

    @classmethod
    def determinism(cls, device: Device, options: EngineOptions) -> Determinism:
        """Bit for bit on a CPU. Raises ConfigError for options that only a server of models has."""
        if options != EngineOptions(timeout_s=options.timeout_s, trust=options.trust):
            raise ConfigError(
                "the transformers engine runs one copy of the teacher on one device as its checkpoint is; "
                "parallelism, quantization and engine arguments are for --engine sglang",
                where="--engine transformers",
            )
        return "bitwise" if device == "cpu" else "tolerance"

    @property
    def architecture(self) -> str:
        return type(self._model).__name__

    def run(self, batches: Iterable[Sequence[Request]]) -> Iterator[Ack]:
        """Run the batches in order; see TeacherEngine.run. On CUDA a batch lands while the next one runs."""
        in_flight = 1 if self._device.type == "cuda" else 0
        flights: deque[_Flight] = deque()
        for batch in batches:
            flights.append(self._launch(batch))
            while len(flights) > in_flight:
                yield from _land(flights.popleft())
        while flights:
            yield from _land(flights.popleft())

    def canary(self, head: Head, samples: Sequence[np.ndarray]) -> Canary:
        """The head's formula against the model's own logits; see canary.check_head. The first forward of all."""
        try:
            error = check_head(self, head, samples, path=self._path)
        except Exception as err:
            # Any model's code, which may raise anything.
            if is_of_others(err):
                raise
            raise TeacherError(
                f"{self.architecture} does not run on token ids alone: {in_one_line(err)}", where=self._path
            ) from err
        return Canary(logit_error=error, row_error=0.0)

    def close(self) -> None:
        """Free the model."""
        self._open(None)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def rows_and_logits(self, token_ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """The head's input [n, E] and the model's own logits [n, V] for one sample: what canary.check_head compares."""
        logits = self._forward(_ids(token_ids, self._device), keep=None)
        return self._take_hidden(), logits[0]

    def _open(self, model: Any) -> None:
        """Take the model, or let go of it."""
        self._model = model
        self._hidden: torch.Tensor | None = None
        self._keep: torch.Tensor | None = None
        if model is not None:
            self._num_ids = model.get_input_embeddings().weight.shape[0]
            backbone(model).register_forward_hook(self._capture)

    def _capture(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        """Hook: keep the backbone's last hidden state, pass on the rows of `_keep` (all where it is None)."""
        self._hidden = output.last_hidden_state
        if self._keep is not None:
            output.last_hidden_state = self._hidden.flatten(0, 1)[self._keep][None]
        return output

    def _forward(
        self,
        ids: torch.Tensor,
        *,
        keep: torch.Tensor | None,
        mask: torch.Tensor | None = None,
        chunk_of: _Chunks | None = None,
    ) -> torch.Tensor:
        """One forward of the causal LM over ids [B, n]: its logits for the rows `keep` of the flattened [B*n].

        Positions are the model's own: they count from 0, which is right under right padding, or from the chunk's start.
        """
        self._keep = keep
        extra = {} if mask is None else {"attention_mask": mask}
        if chunk_of is not None and chunk_of.past is not None:
            extra["past_key_values"] = chunk_of.past
        output = self._model(input_ids=ids, use_cache=chunk_of is not None, **extra)
        if chunk_of is not None:
            # A recurrent model keeps its state under another name: its chunks then differ and _may_chunk says no.
            chunk_of.past = getattr(output, "past_key_values", None)
        return output.logits

    def _take_hidden(self) -> torch.Tensor:
        """What the hook kept of the last forward, [B*n, E]."""
        hidden, self._hidden = self._hidden, None
        if hidden is None:
            raise TeacherError("the model runs past its own backbone; its rows cannot be taken", where=self._path)
        # Mamba's last norm gives fp32 and the model casts it for its head; the cast rows are the head's input.
        return hidden.flatten(0, 1).to(self._dtype)

    @torch.inference_mode()
    def _launch(self, batch: Sequence[Request]) -> _Flight:
        """Start one batch: what fits in a forward runs together, each longer sample alone in chunks."""
        pieces: list[list[_Piece]] = [[] for _ in batch]
        together = []
        for index, request in enumerate(batch):
            self._check(request)
            if len(request.token_ids) > self._chunk_tokens and self._may_chunk(request.token_ids):
                pieces[index] = self._run_chunks(request)
            else:
                together.append(index)
        if together:
            found = self._run_together([batch[index] for index in together])
            for index, piece in zip(together, found, strict=True):
                pieces[index] = [piece]
        landed = None
        if self._device.type == "cuda":
            landed = torch.cuda.Event()
            landed.record()
        return _Flight(batch=batch, pieces=pieces, landed=landed)

    def _check(self, request: Request) -> None:
        """An id without an embedding would be a crash of the whole device."""
        highest = int(request.token_ids.max())
        if highest >= self._num_ids:
            message = f"sample {request.sample} has token id {highest}, the teacher knows {self._num_ids}"
            raise TeacherError(f"{message}; was it made with another tokenizer?", where=self._path)

    def _run_together(self, requests: list[Request]) -> list[_Piece]:
        lengths = [len(request.token_ids) for request in requests]
        width = max(lengths)
        ids = np.zeros((len(requests), width), dtype=np.int64)
        for row, request in zip(ids, requests, strict=True):
            row[: len(request.token_ids)] = request.token_ids
        mask = None
        if min(lengths) < width:
            if not self._may_pad(requests[lengths.index(min(lengths))].token_ids, width):
                return [piece for request in requests for piece in self._run_together([request])]
            mask = _to_device(np.arange(width) < np.array(lengths)[:, None], self._device).long()
        spans = [_span(request, 0, width) for request in requests]
        return self._run_spans(spans, _to_device(ids, self._device), mask=mask)

    def _run_chunks(self, request: Request) -> list[_Piece]:
        """One sample in chunks; each sees those before it through the KV cache."""
        ids = _ids(request.token_ids, self._device)
        chunks = _Chunks()
        pieces = []
        for start in range(0, ids.shape[1], self._chunk_tokens):
            stop = min(start + self._chunk_tokens, ids.shape[1])
            pieces += self._run_spans([_span(request, start, stop)], ids[:, start:stop], chunk_of=chunks)
        return pieces

    def _run_spans(
        self,
        spans: list[_Span],
        ids: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        chunk_of: _Chunks | None = None,
    ) -> list[_Piece]:
        """One forward over ids [B, n], the rows and log-probabilities that the spans want started to the host."""
        width = ids.shape[1]
        columns = np.concatenate([index * width + span.probe_columns for index, span in enumerate(spans)])
        targets = np.concatenate([span.scored for span in spans])
        # Without a probe the head runs on one row: no model's code is asked to take none.
        keep = _to_device(columns if len(columns) else np.zeros(1, dtype=np.int64), self._device)
        logits = self._forward(ids, keep=keep, mask=mask, chunk_of=chunk_of)[0, : len(columns)].float()
        chosen = logits.gather(1, _to_device(targets, self._device))
        logprobs = _to_host(chosen - logits.logsumexp(dim=1, keepdim=True))
        wanted = np.concatenate([index * width + span.columns for index, span in enumerate(spans)])
        rows = _to_host(self._take_hidden().index_select(0, _to_device(wanted, self._device)))
        by_rows = rows.split([span.hi - span.lo for span in spans])
        by_probes = logprobs.split([len(span.probes) for span in spans])
        return [
            _Piece(lo=span.lo, hi=span.hi, rows=some, probes=span.probes, logprobs=scores)
            for span, some, scores in zip(spans, by_rows, by_probes, strict=True)
        ]

    def _may_pad(self, token_ids: np.ndarray, width: int) -> bool:
        """Whether this model gives a sample the rows that it has alone when it is padded, tried once.

        A model whose own code leaves the mask out of account, or counts positions from the end, says nothing.
        """
        if self._pads_agree is None:
            keep = torch.zeros(1, dtype=torch.int64, device=self._device)
            self._forward(_ids(token_ids, self._device), keep=keep)
            alone = self._take_hidden().float()
            padded = np.pad(token_ids, (0, width - len(token_ids)))
            mask = _to_device(np.arange(width) < len(token_ids), self._device).long()[None]
            self._forward(_ids(padded, self._device), keep=keep, mask=mask)
            error = (self._take_hidden()[: len(alone)].float() - alone).norm(dim=1) / alone.norm(dim=1)
            self._pads_agree = float(error.median()) <= TRIAL_ERROR[self._dtype]
            if not self._pads_agree:
                self.notes.append("samples run one by one: in a padded batch this model gives other rows")
        return self._pads_agree

    def _may_chunk(self, token_ids: np.ndarray) -> bool:
        """Whether chunks give this model the rows of a whole run, tried once on the first tokens of a long sample.

        Some models with recurrent layers start a chunk of several tokens from an empty state and say nothing; they
        run whole, whatever the length.
        """
        if self._chunks_agree is None:
            self._chunks_agree = self._trial_error(token_ids) <= TRIAL_ERROR[self._dtype]
            if not self._chunks_agree:
                self.notes.append("long samples run whole: in chunks this model gives other rows")
        return self._chunks_agree

    def _trial_error(self, token_ids: np.ndarray) -> float:
        """|chunked - whole| / |whole| of the first row of each chunk after the first: median of them."""
        ids = _ids(token_ids[:TRIAL_TOKENS], self._device)
        chunk = min(TRIAL_CHUNK, self._chunk_tokens)
        keep = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._forward(ids, keep=keep)
        whole = self._take_hidden()[chunk::chunk].float()
        chunks = _Chunks()
        parts = []
        for part in ids.split(chunk, dim=1):
            self._forward(part, keep=keep, chunk_of=chunks)
            parts.append(self._take_hidden())
        chunked = torch.cat(parts)[chunk::chunk].float()
        return float(((chunked - whole).norm(dim=1) / whole.norm(dim=1)).median())


def _span(request: Request, start: int, stop: int) -> _Span:
    """What `request` wants of its tokens start:stop."""
    lo, hi = (int(edge) for edge in np.searchsorted(request.positions, (start, stop)))
    probes = np.flatnonzero((request.probes >= lo) & (request.probes < hi))
    positions = request.positions[request.probes[probes]]
    return _Span(
        lo=lo,
        hi=hi,
        columns=request.positions[lo:hi] - start,
        probes=probes,
        probe_columns=positions - start,
        scored=request.scored[probes],
    )


def _land(flight: _Flight) -> Iterator[Ack]:
    """Write a batch's rows to their places and acknowledge each request."""
    if flight.landed is not None:
        flight.landed.synchronize()
    for request, pieces in zip(flight.batch, flight.pieces, strict=True):
        target = as_tensor(request.target.array)
        logprobs = np.full(request.scored.shape, np.nan, dtype=np.float32)
        num_rows = 0
        for piece in pieces:
            target[piece.lo : piece.hi] = piece.rows
            logprobs[piece.probes] = piece.logprobs.numpy()
            num_rows += piece.hi - piece.lo
        digest = checksum(request.target.array)
        yield Ack(sample=request.sample, num_rows=num_rows, checksum=digest, probe_logprobs=logprobs)


def _ids(token_ids: np.ndarray, device: torch.device) -> torch.Tensor:
    """One sample as [1, n]."""
    return _to_device(token_ids.astype(np.int64)[None], device)


def _to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A host copy: at once on the CPU, pinned and under way on CUDA."""
    if tensor.device.type != "cuda":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
