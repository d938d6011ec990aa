#!/usr/bin/env bash
# On a machine with an NVIDIA GPU and `pip install -e '.[sglang]'`: does SGLang's cache hold transformers' own rows, and
# what does the sink cost on a teacher of 0.9 billion parameters (random weights, made on the spot)?
#
#     tools/gpu/sglang_sink.sh [PYTHON] [FOLDER]
#
# FOLDER holds the caches (about 4 GB) and goes away afterwards. Prints a comparison of two caches for each small model,
# then the bench's table: seconds over prefill alone, memory, tokens a second; (kdpipe - prefill) / prefill is the share
# of the step that the sink costs. Not yet run: no GPU with SGLang was at hand when it was written.
set -eu
python=$(command -v "${1:-python3}")
export PATH="$(dirname "$python"):$PATH"
root=$(cd "$(dirname "$0")/../.." && pwd)
folder=$(mktemp -d -p "${2:-${TMPDIR:-/tmp}}")
trap 'rm -rf "$folder"' EXIT
cd "$root"
nvidia-smi --query-gpu=name,memory.total --format=csv,noheader

for kind in llama qwen3; do
    "$python" - "$folder/$kind" "$kind" <<'PY'
import sys
from pathlib import Path
from tests.chats import write_chats
from tests.models import make_model, make_tokenizer
folder, kind = Path(sys.argv[1]), sys.argv[2]
sizes = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "max_position_embeddings": 2048}
heads = {"head_dim": 64} if kind == "qwen3" else {}
make_tokenizer(make_model(kind, folder / "teacher", dtype="bfloat16", vocab_size=304, sizes=sizes | heads))
write_chats(folder / "data.jsonl", 200)
PY
    for engine in transformers sglang; do
        kdpipe extract --teacher "$folder/$kind/teacher" --data "$folder/$kind/data.jsonl" \
            --cache "$folder/$kind/$engine" --engine $engine --device cuda --json > /dev/null
    done
    echo "$kind: rows of sglang against rows of transformers"
    kdpipe cache compare "$folder/$kind/transformers" "$folder/$kind/sglang"
done

"$python" tools/bench/sglang_sink.py --device cuda --folder "$folder" \
    --samples 512 --tokens 1024 --hidden 2048 --layers 16 --vocab 32768 --json
