#!/bin/sh
# What a machine with torch, transformers and their like, and without a network, lacks of this
# project, as wheels: benchmarks/wheels.sh FOLDER [version of Python there, 3.12]
# `WHEELS=FOLDER benchmarks/gpu.sh OUT` installs them there. Versions are those of requirements.lock.
set -eu
cd "$(dirname "$0")/.."
if [ $# -eq 0 ]; then
    echo "error: no folder for the wheels: benchmarks/wheels.sh FOLDER [3.12]" >&2
    exit 2
fi
out=$1 version=${2:-3.12}
# What torch's images have is left out: numpy, pillow, scikit-learn, timm, safetensors and so on.
pure="deepspeed hjson fire termcolor webdataset braceexpand tomli-w httpx2 httpcore2 truststore idna"
compiled="pydantic pydantic-core annotated-types typing-extensions typing-inspection"
locked() {
    for name in $1; do
        grep -iE "^$(echo "$name" | sed 's/[-_]/[-_]/g')==" requirements.lock | tr -d "\\\\ " || {
            echo "error: requirements.lock has no $name: leave it out of benchmarks/wheels.sh" >&2
            exit 2
        }
    done
}
pip=$(mktemp -d)
trap 'rm -rf "$pip"' EXIT
python3 -m venv "$pip"
mkdir -p "$out"
# DeepSpeed comes as source: without its compiled ops it is pure Python.
# shellcheck disable=SC2046  # one word a requirement
DS_BUILD_OPS=0 "$pip/bin/pip" wheel --quiet --no-deps --wheel-dir "$out" $(locked "$pure")
# shellcheck disable=SC2046
"$pip/bin/pip" download --quiet --no-deps --only-binary=:all: --python-version "$version" \
    --platform manylinux2014_x86_64 --dest "$out" $(locked "$compiled")
du -sh "$out"
