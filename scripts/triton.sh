#!/bin/sh
# Make or renew .venv-triton: what is in .venv, and Triton, whose kernels its interpreter runs on a CPU.
. "$(dirname "$0")/lib.sh"

here=.venv-triton
packages="triton"
wanted="$packages $(cksum constraints.txt)"
if is_finished "$here" "$wanted"; then
    exit 0
fi
begin "$here" "$packages"
install_into "$here" constraints.txt "$packages"
finish "$here" "$wanted"
