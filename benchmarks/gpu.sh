#!/bin/sh
# The benchmark on one GPU: benchmarks/gpu.sh OUT [options of `python -m benchmarks.gpu bench`].
# Leaves tables, JSON records, profiles, log and machine in OUT. One call of a size stays under ten
# minutes: benchmarks/gpu.sh out --sizes vit_base:256
set -eu
cd "$(dirname "$0")/.."
if [ $# -eq 0 ]; then
    echo "error: no folder for the results: benchmarks/gpu.sh OUT" >&2
    exit 2
fi
out=$1
shift
if [ -x .venv/bin/python ]; then python=.venv/bin/python; else python=python3; fi
exec "$python" -m benchmarks.gpu bench --out "$out" "$@"
