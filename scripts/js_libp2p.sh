#!/bin/sh
# Make or renew .js-libp2p: js-libp2p of npm, whose relay a test of the lab uses.
. "$(dirname "$0")/lib.sh"

here=.js-libp2p
packages="libp2p@3.3.11 @libp2p/tcp@11.0.28 @libp2p/identify@4.1.14 @libp2p/circuit-relay-v2@4.2.13
    @chainsafe/libp2p-noise@17.0.0 @chainsafe/libp2p-yamux@8.0.1"

if is_finished "$here" "$packages"; then
    exit 0
fi
if ! command -v npm > /dev/null; then
    echo "test-js: npm is not installed (Debian: apt-get install nodejs npm, version 20 or later)" >&2
    exit 2
fi
echo "  installing js-libp2p into $here"
rm -rf "$here"
mkdir "$here"
# shellcheck disable=SC2086  # several words
npm install --prefix "$here" --silent --no-audit --no-fund $packages
finish "$here" "$packages"
