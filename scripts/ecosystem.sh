#!/bin/sh
# Make or renew .venv-ecosystem: what is in .venv, and other packages that use transformers models.
# Versions of shared packages stay those of constraints.txt.
set -eu

here=.venv-ecosystem
packages="accelerate peft trl lm-eval outlines"
mark="$here/installed"
wanted="$packages $(cksum constraints.txt)"
if [ -f "$mark" ] && [ "$(cat "$mark")" = "$wanted" ]; then
    exit 0
fi
echo "  installing $packages into $here"
rm -rf "$here"
"$PYTHON" -m venv "$here"
# The packages of .venv are found behind those of this environment.
"$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    > "$("$here/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
# shellcheck disable=SC2086  # several words
"$here/bin/pip" install --quiet -c constraints.txt $packages
echo "$wanted" > "$mark"
