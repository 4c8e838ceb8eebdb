#!/bin/sh
# Ten minutes of a GPU: benchmarks/gpu.sh OUT [options of `python -m benchmarks.gpu`].
# Where packages are missing and there is no network, WHEELS names a folder of them, which
# benchmarks/wheels.sh fills: WHEELS=wheels benchmarks/gpu.sh OUT --first true
set -eu
cd "$(dirname "$0")/.."
if [ $# -eq 0 ]; then
    echo "error: no folder for the results: benchmarks/gpu.sh OUT" >&2
    exit 2
fi
if [ -x .venv/bin/python ]; then python=$PWD/.venv/bin/python; else python=${PYTHON:-python3}; fi
if [ -n "${WHEELS:-}" ]; then
    there=$PWD/.cache/wheels
    if [ ! -e "$there/done" ]; then
        "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$there" "$WHEELS"/*.whl
        touch "$there/done"
    fi
    export PYTHONPATH="$there:$PWD${PYTHONPATH:+:$PYTHONPATH}" PATH="$there/bin:$PATH"
fi
exec "$python" -m benchmarks.gpu "$@"
