#!/bin/sh
# Make or renew .venv-ecosystem: what is in .venv, and other packages that use transformers models.
# Versions of shared packages stay those of constraints.txt.
. "$(dirname "$0")/lib.sh"

here=.venv-ecosystem
packages="accelerate peft trl lm-eval outlines"
wanted="$packages $(cksum constraints.txt)"
if is_finished "$here" "$wanted"; then
    exit 0
fi
begin "$here" "$packages"
install_into "$here" constraints.txt "$packages"
finish "$here" "$wanted"
