# What the scripts of this folder share, to be read by them: . "$(dirname "$0")/lib.sh"
# An environment beside .venv is finished once its mark says what was wanted in it.
# shellcheck shell=sh
set -eu
cd "$(dirname "$0")/.."

# is_finished FOLDER WANTED
is_finished() {
    [ -f "$1/installed" ] && [ "$(cat "$1/installed")" = "$2" ]
}

# begin FOLDER PACKAGES: a new environment of $PYTHON, in which the packages of .venv are found after its own.
begin() {
    echo "  installing $2 into $1"
    rm -rf "$1"
    "$PYTHON" -m venv "$1"
    purelib "$PYTHON" > "$(purelib "$1/bin/python")/shared.pth"
}

purelib() {
    "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
}

# install_into FOLDER CONSTRAINTS PACKAGES
install_into() {
    # shellcheck disable=SC2086  # several words
    "$1/bin/pip" install --quiet -c "$2" $3
}

# finish FOLDER WANTED
finish() {
    echo "$2" > "$1/installed"
}
