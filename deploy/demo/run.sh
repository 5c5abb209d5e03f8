#!/usr/bin/env bash
# The main job on the shipped policy: launch the service, train against it over HTTP, compare the drafters, report.
# Called by `make demo`. Ends every process that it starts, also when interrupted.
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=.venv/bin
endpoint=http://127.0.0.1:8000
began=$SECONDS

rm -rf report
mkdir -p report

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

say "1/3  Launching the rollout service ($endpoint)"
# A job of its own group: Ctrl-C reaches the trainer, and the trap ends the service in order.
set -m
"$bin/rollout-service" launch --config deploy/demo/service.toml &
service=$!
set +m
trap 'kill -INT "$service" 2>/dev/null && wait "$service" || true' EXIT

say "2/3  Training against it: synchronous GRPO"
"$bin/rl-loop" train --config deploy/demo/train.toml --endpoint "$endpoint" --output report/train
kill -INT "$service"
wait "$service" || true
trap - EXIT

say "3/3  Comparing the drafters"
"$bin/rollout-service" compare --config deploy/demo/compare.toml

"$bin/python" deploy/demo/report.py report "$((SECONDS - began))"
