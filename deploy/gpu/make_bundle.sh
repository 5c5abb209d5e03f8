#!/bin/bash
# make_bundle.sh FOLDER: writes to FOLDER what the checks need on a GPU machine without a network.
#   FOLDER/vllm.tar.xz   vLLM's CUDA wheel with GPU code for an H100 only, and the entry point of this project's plugin
#   FOLDER/wheels/       the packages of wheels.txt
# It needs the package index, 2 GB of disk, and one to three minutes.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
bundle=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

download() { # FOLDER REQUIREMENTS: downloads wheels for Python 3.12 on Linux, whatever Python runs here
    local platforms=(any)
    for glibc in 2_35 2_31 2_28 2_27 2_26 2_24 2_17; do platforms+=("manylinux_${glibc}_x86_64"); done
    platforms+=(manylinux2014_x86_64 manylinux1_x86_64)
    python3 -m pip download -qq --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --abi cp312 --abi abi3 --abi none "${platforms[@]/#/--platform=}" --dest "$1" "${@:2}"
}

download . vllm==0.32.0
mkdir full small
python3 -m zipfile -e vllm-0.32.0-*.whl full
tar -C full -cf - --exclude='*.so' --exclude='*/include/*' --exclude='*/instrumentator/static/*' --exclude=vllm-rs \
    vllm vllm-0.32.0.dist-info | tar -C small -xf -
for library in _C_stable_libtorch _moe_C_stable_libtorch; do
    python3 "$here/strip_cubins.py" "full/vllm/$library.abi3.so" "small/vllm/$library.abi3.so"
done
attention=vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so
python3 "$here/strip_cubins.py" "full/$attention" "small/$attention" --attention
cp full/vllm/{cumem_allocator,spinloop,fs_io_C}.abi3.so small/vllm/

# vLLM finds plugins by the entry points of installed packages. The project's code is read from the checkout.
project=small/rollout_service-0.1.0.dist-info
mkdir "$project"
printf 'Metadata-Version: 2.1\nName: rollout-service\nVersion: 0.1.0\n' > "$project/METADATA"
printf '[vllm.general_plugins]\nrollout_service = rollout_service.vllm_plugin:register\n' > "$project/entry_points.txt"
tar -C small -cf - . | xz -T1 -5 > "$bundle/vllm.tar.xz"

rm -rf "$bundle/wheels"
download "$bundle/wheels" --requirement "$here/wheels.txt"
du -sh "$bundle"
