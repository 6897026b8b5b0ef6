#!/bin/sh
# Brings promtool, of Debian's package prometheus, into .promtool without installing anything.
. "$(dirname "$0")/lib.sh"

[ -x .promtool/usr/bin/promtool ] && exit 0
if ! command -v apt-get >/dev/null 2>&1 || ! command -v dpkg-deb >/dev/null 2>&1; then
    echo "test-metrics: promtool is not on the PATH, and this system has no apt-get to bring it" >&2
    exit 2
fi
rm -rf .promtool
mkdir -p .promtool
(
    cd .promtool
    apt-get download prometheus >/dev/null 2>&1 || { apt-get update >/dev/null && apt-get download prometheus; }
    dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x ./usr/bin/promtool
    rm prometheus_*.deb
)
