#!/bin/sh
# Runs the fast tests on other versions of Python, torch and transformers, in an environment of its
# own; not in CI, for torch takes some gigabytes.
#
#   tests/versions.sh python3.10 2.7.1 4.57.6 [core | files or options of pytest]
#
# `core` are the tests of rounds on every kind of model, of processes and of Trainer: a third of all.
# Tests of scripts and of packages that are not installed here are left out. Warnings are none of
# this library's where torch or transformers is old, and fail no test.
set -e
cd "$(dirname "$0")/.."
if [ $# -lt 3 ]; then
    echo "usage: tests/versions.sh PYTHON TORCH TRANSFORMERS [core | files or options of pytest]" >&2
    exit 2
fi
PYTHON=$1 TORCH=$2 TRANSFORMERS=$3
shift 3
FOLDER=${ENVIRONMENTS:-runs/versions}/$(basename "$PYTHON")-$TORCH-$TRANSFORMERS
if [ ! -e "$FOLDER/.ready" ]; then
    "$PYTHON" -m venv "$FOLDER"
    case $TRANSFORMERS in 4.*) OLD="accelerate<1.11 datasets<5 numpy<2.4" ;; *) OLD="" ;; esac
    # shellcheck disable=SC2086
    "$FOLDER/bin/pip" install -q "torch==$TORCH" "transformers==$TRANSFORMERS" $OLD \
        accelerate datasets numpy scipy scikit-learn matplotlib \
        peft pytest pytest-xdist hypothesis filelock psutil
    touch "$FOLDER/.ready"
fi
if [ "$*" = core ]; then
    set --
    for NAME in game site routes checkpointing compile distributed sharded precision fp16 resume \
        recompute optimizer zoo trainer mat weights; do
        set -- "$@" "tests/test_$NAME.py"
    done
elif [ $# -eq 0 ]; then
    WORDS='^ *(from|import) (common|studying|benchmark_parts|trl|lightning|smart_pytorch|sentence_transformers|pydantic|tomllib|nashpy|pyspiel)\b'
    SCRIPTS=$(cd examples && ls ./*.py research/*.py | sed 's/.*\///; s/\.py$//' | paste -sd '|' -)
    # shellcheck disable=SC2046
    set -- $(grep -LE "$WORDS|^ *import ($SCRIPTS)$|tests\.(scripts|pages)" tests/test_*.py)
fi
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH="$PWD"
exec "$FOLDER/bin/python" -m pytest -q -p no:cacheprovider -W default --tb=line -rf \
    --continue-on-collection-errors "$@"
