#!/bin/bash
# The steps of Dockerfile and compose.yaml without Docker: install, train, serve TensorBoard, train on two nodes. Run it in
# an empty folder.
#
#   docker/without.sh [VENV]      virtual environment with the package; by default a new one is created
set -euo pipefail

source=$(cd "$(dirname "$0")/.." && pwd)
venv=${1:-}
if [ -z "$venv" ]; then
    venv=$PWD/venv
    python3 -m venv "$venv"
    PATH=$venv/bin:$PATH "$source/docker/install.sh" torch
    PATH=$venv/bin:$PATH "$source/docker/install.sh" package "$source"
fi
PATH=$venv/bin:$PATH

echo "== train"
short=(--trainer.accelerator=cpu --trainer.max_epochs=2 --trainer.enable_progress_bar=false --dashboard.every_n_epochs=0)
python -m lsoftmax_lightning fit --config=digits.yaml "${short[@]}"

echo "== tensorboard"
free() { python -c "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])"; }
port=$(free)
python -m tensorboard.main --logdir=runs --port="$port" &
trap 'kill $(jobs -p)' EXIT
tags=
for _ in $(seq 60); do
    tags=$(python -c "import urllib.request as r; print(r.urlopen('http://localhost:$port/data/plugin/scalars/tags').read())" \
        2>/dev/null) && [[ $tags == *effective_margin* ]] && break
    sleep 1
done
[[ $tags == *effective_margin* ]]

echo "== two nodes"
port=$(free)
node() {
    python -m torch.distributed.run --nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d --rdzv_endpoint="localhost:$port" \
        -m lsoftmax_lightning fit --config=digits.yaml --trainer.num_nodes=2 --trainer.devices=1 --trainer.strategy=ddp \
        --trainer.logger.name=nodes "${short[@]}"
}
node &
other=$!
node
wait $other
test -f runs/nodes/*/results.json
echo "== all steps succeeded"
