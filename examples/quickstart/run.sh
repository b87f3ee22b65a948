#!/usr/bin/env bash
# Cold-start a small Qwen3-MoE on worked answers, improve it with GSPO, draw what happened.
# Settings of the two runs are in sft.toml and gspo.toml; SEED=n repeats them with another seed.
set -euo pipefail
cd "$(dirname "$0")/../.."

python=.venv/bin/python
seed=${SEED:-11}
folder=${FOLDER:-runs/quickstart-$(date +%Y%m%d-%H%M%S)}

echo "== 1/3 cold start: random weights, worked answers"
$python -m gspo_megatron sft examples/quickstart/sft.toml --run.folder "$folder/sft" --run.seed "$seed"
echo "== 2/3 GSPO on verifiable rewards"
$python -m gspo_megatron train examples/quickstart/gspo.toml \
  --model.path "$folder/sft/final" --run.folder "$folder/gspo" --run.seed "$seed" "$@"
echo "== 3/3 report"
$python -m gspo_megatron report "$folder/gspo"
