#!/bin/bash
# call.sh STAGES: runs stages of checks/check.py on the GPU machine. Call it in the root of the checkout.
# The first call unpacks the bundle. Stages that + joins run side by side, and a space separates stages that run one
# after the other. Commas join the words of a stage. Without stages, the bundle is only unpacked.
#   BUNDLE   the folder that make_bundle.sh wrote (.gpu)
#   SITE     the folder that the bundle is unpacked into (/tmp/gpu-site)
#   OUT      the folder for the log of each stage (/tmp/gpu-checks)
#   LIMIT    the seconds that a stage may take (300)
#   PYTHON   the interpreter (python3)
bundle=${BUNDLE:-.gpu}
out=${OUT:-/tmp/gpu-checks}
site=${SITE:-/tmp/gpu-site}
python=${PYTHON:-python3}
export PYTHONPATH=$site:$PWD PYTHONUNBUFFERED=1 VLLM_CACHE_ROOT=/tmp/gpu-vllm-cache TRITON_CACHE_DIR=/tmp/gpu-triton-cache

if [ ! -e "$site/ready" ]; then
    mkdir -p "$site"
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" \
        "$bundle"/wheels/*.whl || exit 3
    # Python unpacks the archive, because the machine may have no xz.
    "$python" -c "import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter='fully_trusted')" \
        "$bundle/vllm.tar.xz" "$site" || exit 4
    "$python" -m compileall -q -j 16 "$site" > /dev/null 2>&1
    touch "$site/ready"
    echo "set up after $SECONDS s"
fi
[ $# -gt 0 ] || exit 0

stage() { # WORDS: runs one stage and prints its results at the end
    local log=$out/$1.log
    timeout --kill-after 5 "${LIMIT:-300}" "$python" deploy/gpu/checks/check.py ${1//,/ } > "$log" 2>&1
    echo "== $1: exit status $?, at $SECONDS s"
    grep -E '^\[ *[0-9.]+s\]' "$log"
}

mkdir -p "$out"
for group in "$@"; do
    for words in ${group//+/ }; do stage "$words" & done
    wait
done
grep -HE '[Ee]rror' "$out"/*.log | tail -20
exit 0
