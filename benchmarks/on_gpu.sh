#!/bin/sh
# Measure this package on a machine with one NVIDIA GPU, in at most 8 minutes after the installation:
#   benchmarks/on_gpu.sh [options of benchmarks/on_gpu.py]
# Makes .venv-gpu if it is not there; PEER_PYTHON=/path/to/python names one with torch and diffusers.
set -eu
cd "$(dirname "$0")/.."
make --no-print-directory .venv-gpu/.gpu
exec .venv-gpu/bin/python benchmarks/on_gpu.py ${PEER_PYTHON:+--peer_python="$PEER_PYTHON"} "$@"
