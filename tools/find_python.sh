#!/bin/sh
# Print the path of a Python that works, the first of the versions asked for: tools/find_python.sh [3.13 3.12 3.11]
# Looks on PATH, then among pyenv's versions. Every candidate is really run, because a pyenv shim may exist for a
# version that is not active, and a system Python may lack venv. PYTHON=/path/to/python takes the choice away.
set -u

# working INTERPRETER [VERSION]: prints where it lies, if it has what a virtual environment with pip needs.
working() {
    "$1" -c '
import ctypes, ensurepip, ssl, sys, venv, zlib
wanted = sys.argv[1:]
version = "%d.%d" % sys.version_info[:2]
if version not in wanted if wanted else sys.version_info < (3, 11):
    sys.exit(1)
print(getattr(sys, "_base_executable", sys.executable))
' ${2:+"$2"} </dev/null 2>/dev/null
}

if [ -n "${PYTHON:-}" ]; then
    working "$PYTHON" && exit 0
    echo "PYTHON=$PYTHON does not run as Python 3.11 or newer with venv, ensurepip and ssl." >&2
    exit 1
fi

[ $# -gt 0 ] || set -- 3.13 3.12 3.11
pyenv=${PYENV_ROOT:-${HOME:-}/.pyenv}
for version in "$@"; do
    IFS=:
    for folder in ${PATH:-}; do
        for name in "python$version" python3 python; do
            [ -x "$folder/$name" ] && working "$folder/$name" "$version" && exit 0
        done
    done
    unset IFS
    for candidate in "$pyenv/versions/$version"*/bin/python; do
        [ -x "$candidate" ] && working "$candidate" "$version" && exit 0
    done
done
echo "No working Python $(echo "$@" | sed 's/ / or /g') (with venv and ssl) was found on PATH or in $pyenv;" \
    "install one, or set PYTHON=/path/to/python." >&2
exit 1
