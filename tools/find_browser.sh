#!/bin/sh
# Print the path of a Chromium that starts. Where there is none, Debian's is installed first, if this is root.
# CHROMIUM=/path/to/chromium takes the choice away.
set -u

# working NAME: prints where it lies, if it starts.
working() {
    path=$(command -v "$1") && "$path" --version </dev/null >/dev/null 2>&1 && echo "$path"
}

if [ -n "${CHROMIUM:-}" ]; then
    working "$CHROMIUM" && exit 0
    echo "CHROMIUM=$CHROMIUM does not start." >&2
    exit 1
fi

found() {
    for name in chromium chromium-browser google-chrome chrome; do
        working "$name" && return 0
    done
    return 1
}

found && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "No Chromium was found; install one (as root: apt-get install chromium), or set CHROMIUM=/path/to/chromium." >&2
    exit 1
fi
echo "Installing Debian's Chromium (about 400 MB on disk)" >&2
export DEBIAN_FRONTEND=noninteractive
{ timeout 300 apt-get update -qq && timeout 900 apt-get install -qq --no-install-recommends chromium; } \
    </dev/null >&2 && found && exit 0
echo "Chromium could not be installed with apt-get; install one, or set CHROMIUM=/path/to/chromium." >&2
exit 1
