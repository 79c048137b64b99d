#!/usr/bin/env bash
# Test the wheel as users get it: build it, install it into a new environment and run `reft demo`,
# in a temporary folder outside the checkout. Usage: scripts/test_wheel.sh python3.12
set -euo pipefail
python=${1:-python3}
cd "$(dirname "$0")/.."
checkout=$PWD
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH PYTHONHOME
"$python" -m venv "$folder/environment"
bin=$folder/environment/bin

rm -rf build/lib # setuptools would pack files of an earlier build
"$bin/python" -m pip wheel . --quiet --no-deps --wheel-dir "$folder"
# torch is installed first with its pinned version: other versions install CUDA packages.
"$bin/python" -m pip install --quiet "$(grep '^torch==' constraints.txt)"
"$bin/python" -m pip install --quiet -c constraints.txt "$(echo "$folder"/reft-*.whl)[train]"
"$bin/python" -m pip check

cd "$folder"
"$bin/python" - "$checkout" <<'END'
import sys
from importlib.util import find_spec
from pathlib import Path

import reft
import reft_kernels

checkout, environment = Path(sys.argv[1]).resolve(), Path(sys.prefix).resolve()
for path in map(Path, filter(None, sys.path)):
    inside = checkout in (path.resolve(), *path.resolve().parents)
    assert not inside or environment in path.resolve().parents, f"the checkout is on the path: {path}"
for package in (reft, reft_kernels):
    assert environment in Path(package.__file__).resolve().parents, package.__file__
assert find_spec("reft_kernels.devtools") is None, "developer tools are in the wheel"
print(f"Python {sys.version.split()[0]}, reft {reft.__version__} of {Path(reft.__file__).parent}")
END
"$bin/reft" --version
"$bin/reft" demo --output "$folder/demo"
test -s "$folder/demo/adapter/adapter_model.safetensors"
echo "test-wheel passed: $("$bin/python" --version), $(basename "$folder"/reft-*.whl)"
