#!/bin/sh
# Make or renew .venv-browser: what is in .venv, and Playwright with axe-core to drive the gateway's page.
# The browser is Debian's Chromium, or any that is installed; CHROMIUM=/path/to/chromium names another.
# With TEST_BROWSER=optional a machine that cannot have these is no failure: the tests then skip, with the reason.
. "$(dirname "$0")/lib.sh"

here=.venv-browser
packages="playwright==1.65.2 axe-playwright-python==0.1.8"
wanted="$packages $(cksum constraints.txt)"

find_browser() {
    if [ -n "${CHROMIUM:-}" ]; then
        command -v "$CHROMIUM"
        return
    fi
    for name in chromium-headless-shell chromium chromium-browser google-chrome chrome; do
        command -v "$name" && return
    done
    return 1
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    else
        sudo -n "$@"
    fi
}

install_browser() {
    command -v apt-get > /dev/null || return 1
    [ "$(id -u)" = 0 ] || sudo -n true 2> /dev/null || return 1
    echo "  installing chromium-headless-shell with apt-get"
    for package in chromium-headless-shell chromium; do
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" \
            > /dev/null 2>&1 && return
    done
    as_root apt-get update -qq > /dev/null 2>&1
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium \
        > /dev/null 2>&1
}

if ! find_browser > /dev/null && ! { install_browser && find_browser > /dev/null; }; then
    echo "test-browser: no Chromium is installed, and this user cannot install one." >&2
    echo "  Install the package chromium (Debian: apt-get install chromium-headless-shell)," >&2
    echo "  or name a browser: make test-browser CHROMIUM=/path/to/chromium" >&2
    [ "${TEST_BROWSER:-}" = optional ] || exit 1
fi

if is_finished "$here" "$wanted"; then
    exit 0
fi
begin "$here" "$packages"
if ! install_into "$here" constraints.txt "$packages"; then
    [ "${TEST_BROWSER:-}" = optional ] || exit 1
    exit 0
fi
finish "$here" "$wanted"
