#!/usr/bin/env bash
# Cold-start a small Qwen3-MoE on worked answers, improve it with GSPO, draw what happened.
# Settings of the two runs are in sft.toml and gspo.toml; SEED=n repeats them with another seed, ENGINE=sglang takes the
# rollouts of GSPO from an SGLang server.
set -euo pipefail
cd "$(dirname "$0")/../.."

python=.venv/bin/python
seed=${SEED:-11}
engine=${ENGINE:-embedded}
case $engine in
  embedded | sglang) ;;
  *) echo "error: ENGINE=$engine must be embedded or sglang" >&2; exit 2 ;;
esac
folder=${FOLDER:-runs/quickstart-$(date +%Y%m%d-%H%M%S)}
# The settings ask for two ranks, of which each takes a GPU where there are GPUs.
layout=()
if [[ $($python -W ignore -c 'import torch; print(torch.cuda.device_count())') == 1 ]]; then
  layout=(--parallel.tensor 1 --parallel.expert 1)
fi

echo "== 1/3 cold start: random weights, worked answers"
$python -m gspo_megatron sft examples/quickstart/sft.toml --run.folder "$folder/sft" --run.seed "$seed" "${layout[@]}"
echo "== 2/3 GSPO on verifiable rewards, rollouts from the $engine engine"
$python -m gspo_megatron train examples/quickstart/gspo.toml --rollout.engine "$engine" \
  --model.path "$folder/sft/final" --run.folder "$folder/gspo" --run.seed "$seed" "${layout[@]}" "$@"
echo "== 3/3 report"
$python -m gspo_megatron report "$folder/gspo"
