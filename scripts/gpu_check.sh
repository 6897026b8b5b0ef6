#!/bin/sh
# Proves the code for GPUs on a machine with one, in less than eight minutes: sh scripts/gpu_check.sh [SECTION ...]
#
# From the root of the project.  The results are one JSON object a line in $OUT/gpu_check.jsonl (OUT: the folder
# they go to, /tmp if unset), and one line each on the terminal.  Without an environment of its own there (torch with
# CUDA is there, packages are not), wheels unpacked in the folder SITE come last on the path.
#
# --device cuda:1 chooses another GPU; --device cpu --small shows on any machine that the script runs.
set -eu
OUT="${OUT:-/tmp}"
SITE="${SITE:-.gpu/site}"
PYTHON="${PYTHON:-python3}"
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}:$SITE"
PYTHONUNBUFFERED=1
HF_HUB_OFFLINE=1
export OUT PYTHONPATH PYTHONUNBUFFERED HF_HUB_OFFLINE
exec "$PYTHON" scripts/gpu_check.py "$@"
