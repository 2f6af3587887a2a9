#!/bin/sh
# Rewrite constraints.txt: one pinned version of every package for each supported Python. Needs `uv` (or UV=path).
# Pins that still fit stay as they are: tools/pin.sh --upgrade updates all pins, --upgrade-package NAME one.
# torch is pinned by hand and left out of the resolution, because its Linux wheels would pull in a CUDA tool kit.
set -eu
cd "$(dirname "$0")/.."
torch=2.13.0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo "torch; sys_platform == 'never'" > "$work/override.txt"
printf '%s\n' filelock jinja2 networkx setuptools sympy > "$work/torch-needs.in"
cp constraints.txt "$work/pins.txt"
"${UV:-uv}" pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate \
    --no-emit-index-url --no-emit-find-links --extra parity --extra dev --extra tpu --override "$work/override.txt" \
    "$@" --output-file "$work/pins.txt" pyproject.toml "$work/torch-needs.in" > /dev/null
{
    echo "# Pinned versions for Python 3.11 to 3.13; written by tools/pin.sh. Use: pip install -c constraints.txt -e .[test]"
    { grep -v -e '^#' -e '^ *-' -e '^torch==' "$work/pins.txt"; echo "torch==$torch"; } | LC_ALL=C sort -f
} > "$work/constraints.txt"
cp "$work/constraints.txt" constraints.txt
