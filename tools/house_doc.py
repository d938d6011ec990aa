"""Writes docs/house.md, the way of a record and of a row in file names, and README's line for every module.

python tools/house_doc.py            writes both; tests/test_docs.py compares them with the modules
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("manifests", "stages", "pipeline")
BEGIN, END = "<!-- modules: tools/house_doc.py -->", "<!-- end of modules -->"

HEAD = """# The house

`kdpipe.X.Y` is the file `X/Y.py`. Three rooms: `manifests/` holds every record that crosses a stage, without torch;
`stages/` does the work; `pipeline/` is the command line. A room imports downwards only. Inside `stages/` there are
floors, and a stage imports lower floors only (`tests/test_layers.py`):

    draws, ranks, rows  <  prepare, feed  <  models  <  sglang  <  loss, teacher, rollout, codec  <  student, extract
        <  align  <  evaluate, exchange, generate  <  train  <  live

## The way of a record and of its rows

    kdpipe extract
      a line of a data file            prepare/sources.py -> samples.py -> pool.py         to a process for each core
      read there                       prepare/work.py -> forms.py, messages.py           a conversation
      through the chat template        prepare/turns.py, template.py -> marked.py         a text and its targets
      tokenised                        prepare/tokens.py -> manifests/sample.py           ids and mask
      planned                          extract/reading.py, planning.py, staging.py -> manifests/plan.py,
                                       samples.py, shard_table.py                           PLAN.json and two tables
      asked of the teacher             extract/requests.py -> teach.py -> teacher/transformers_engine.py,
                                       sglang_engine.py -> sglang/
      its rows written in place        sglang/sink.py -> extract/shelf.py -> manifests/shard.py
      checked, then committed          teacher/gate.py -> manifests/shard.py, claims.py   shards/, commits/

    kdpipe train
      opened and checked               train/training.py -> models/folder.py, student/check.py, feed/dataset.py
      --data: prepared, no rows        train/samples.py -> extract/reading.py -> prepare/  manifests/prepared.py
      another tokenizer: aligned       align/crossing.py -> aligned.py -> joining.py -> prepare/pairing.py,
                                       boundaries.py -> manifests/aligned.py                spans.arrow
      in the order of the epoch        feed/order.py -> batches.py
      ids from samples.arrow, rows     feed/packing.py <- manifests/samples.py, row_source.py <- cache.py <- shard.py
      through the student              train/trainer.py -> student/student.py -> models/backbone.py
      to the loss and its gradient     loss/problem.py -> fused.py -> blocks.py, pointwise.py
      or across tokenizers             student/across.py -> loss/cross/, loss/cross_metrics.py
      step, checkpoint, evaluation     train/loop.py -> checkpoint.py, evaluate.py
      exported, measured               student/export.py -> train/output.py, run.py       kdpipe.json

    kdpipe stream
      planned as for extract           live/beside.py (the student's side), pipeline/teacher_role.py (the teacher's)
      asked for ahead of its step      feed/batches.py -> manifests/row_source.py -> ring.py
      answered                         live/serve.py -> teacher/, gate.py -> manifests/ring.py, live/tee.py
      a row of the batch               manifests/ring.py -> row_source.py -> feed/packing.py, as from a cache

    kdpipe generate
      a record as the prompt it holds  prepare/samples.py -> forms.py, turns.py            ids up to the answer
      answered, a window at a time     generate/run.py -> rollout/local.py -> decode.py, sampling.py
      a record of the same form        generate/answers.py -> file.py                     data for kdpipe extract

    kdpipe onpolicy
      who answers a step's samples     feed/batches.py -> live/rollouts.py
      an answer                        live/writers.py -> student/student.py -> rollout/decode.py, sampling.py
                                       or rollout/sglang_writer.py -> sglang/, its weights sglang/update.py
      read by another tokenizer        align/retelling.py -> prepare/boundaries.py
      told to the teacher, scored      live/answers.py -> manifests/ring.py -> live/serve.py, as for stream
      written down, kept               live/rollout_log.py; live/kept.py -> a cache
      measured                         live/measuring.py -> evaluate.py
      a teacher made of the student    live/updates.py

    kdpipe cache derive
      a row's distribution             exchange/deriving.py -> kept.py, by the head that lies in the cache
      a few numbers of it, as a cache  manifests/sidecar.py
      to the loss                      loss/sparse.py, in the place of rows and head

    kdpipe cache pack, unpack
      files in blocks, shuffled        manifests/pack.py -> packed.py                      one file
      back, and checked                manifests/unpack.py -> verify.py

    kdpipe submit
      what is left, as words           steps.py <- manifests/specs/members.py, run file and disk
      as few jobs as can be            slurm.py -> OUTPUT/submit/*.sbatch                  text, golden-tested
      what would fail there            preflight.py -> cluster.py (Slurm), precheck.py (the commands themselves)
      recorded, sent, recorded         submit.py -> cluster.py -> manifests/submission.py  jobs.json
      a cache on the node's own disk   training.py -> manifests/node_copy.py

    kdpipe status
      steps by name                    pipeline/entries.py <- manifests/submission.py, specs/members.py
      how each says it stands          pipeline/runs.py, from kdpipe.json, .running, events.jsonl
      what Slurm says of its job       pipeline/queue.py, asked once
      weighed, a line each             pipeline/standing.py

What a new part plugs into: an engine is a `TeacherEngine` (`stages/teacher/engine.py`) and an entry of `ENGINES`; rows
from elsewhere are a `RowSource` (`manifests/row_source.py`) in a `Dataset`; steps of another kind are `Batches`
(`stages/feed/batches.py`); another place for rows is a `Shelf` (`stages/extract/teach.py`); another way to store
rows is a `Codec` and an entry of `CODECS` (`manifests/codec.py`); a divergence is a line of `DIVERGENCES`
(docs/losses.md).
"""


def page() -> str:
    """docs/house.md as it must be."""
    return HEAD


def readme(text: str) -> str:
    """README.md as it must be: a line for every module of each room, folded, where its marks stand."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, "README.md has lost its mark"
    assert end, "README.md has lost its mark"
    return f"{before}{BEGIN}\n{''.join(map(room, ROOMS))}{END}{after}"


def room(name: str) -> str:
    """The modules of a room, a line each."""
    lines = [f"\n<details><summary>{name}/, module by module</summary>\n\n| file | holds |\n|---|---|\n"]
    for path in sorted((ROOT / name).rglob("*.py"), key=lambda path: (path.parent, path.name)):
        if line := first_line(path):
            lines.append(f"| `{path.relative_to(ROOT)}` | {line} |\n")
    return "".join([*lines, "\n</details>\n"])


def first_line(path: Path) -> str:
    """The first paragraph of a module's docstring, on one line; "" for an empty file. Raises ValueError without one."""
    source = path.read_text(encoding="utf-8")
    if not source.strip():
        return ""
    text = ast.get_docstring(ast.parse(source))
    if not text:
        raise ValueError(f"{path}: a module needs a docstring that says what it holds")
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


if __name__ == "__main__":
    (ROOT / "docs" / "house.md").write_text(page(), encoding="utf-8")
    (ROOT / "README.md").write_text(readme((ROOT / "README.md").read_text(encoding="utf-8")), encoding="utf-8")
