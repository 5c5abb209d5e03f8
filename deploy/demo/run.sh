#!/usr/bin/env bash
# The demo: launches the service, trains against it over HTTP, compares the drafters, and writes a report.
# `make demo` calls it. It ends every process that it starts, also when it is interrupted.
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=.venv/bin
endpoint=http://127.0.0.1:8000
began=$SECONDS

rm -rf report
mkdir -p report

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

say "1/3  Launching the rollout service ($endpoint)"
# The service has its own process group: Ctrl-C reaches only the trainer, and then the trap stops the service.
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
