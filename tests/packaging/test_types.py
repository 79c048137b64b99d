"""A type checker sees the types of the installed package, and mistakes in calls."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """\
from torch import Tensor, nn

import reft
from reft import ReftConfig, ReftModel, get_reft_model
from reft_kernels import RowPlan, lowrank_edit


def edited(hidden: Tensor, plan: RowPlan, encode: Tensor) -> Tensor:
    return lowrank_edit(hidden, plan, encode, None, encode)


base = nn.Linear(2, 2)
model = get_reft_model(base, ReftConfig(rank=2, layers=[0], positions="f1"))
reveal_type(model)  # A
reveal_type(get_reft_model)  # B
reveal_type(ReftModel.from_pretrained(base, "folder"))  # C
reveal_type(lowrank_edit)  # D
reveal_type(RowPlan.from_rows([1, 2]))  # E
reveal_type(model.configs)  # F
reveal_type(reft.load_pyreft)  # G
reveal_type(ReftConfig().rank)  # H
get_reft_model(base, 3)  # I
model.save_pretrained("folder", training_sate=True)  # J
"""
#: mark -> pattern of the type checker's message for that line.
SAYS = {
    "A": r'Revealed type is "reft\.model\.reft_model\.ReftModel"',
    "B": r"base_model: torch\.nn\..*Module, config: reft\.config\.ReftConfig,.*-> reft.*ReftModel",
    "C": r'Revealed type is "reft\.model\.reft_model\.ReftModel"',
    "D": r"hidden: torch\..*Tensor, plan: reft_kernels\.rows\.RowPlan, .*-> torch\..*Tensor",
    "E": r'Revealed type is "reft_kernels\.rows\.RowPlan"',
    "F": r"dict\[(builtins\.)?str, reft\.config\.ReftConfig\]",
    "G": r"positions: (builtins\.)?str, .*-> reft\.model\.reft_model\.ReftModel",
    "H": r'Revealed type is "(builtins\.)?int"',
    "I": r'error: Argument 2 to "get_reft_model" has incompatible type "int".*\[arg-type\]',
    "J": r'error: Unexpected keyword argument "training_sate".*\[call-arg\]',
}


def test_a_users_script_under_strict(wheel, tmp_path) -> None:
    # An environment with the wheel; its dependencies are found in the current environment.
    home = tmp_path / "environment"
    command = [sys.executable, "-m", "venv", "--without-pip", str(home)]
    subprocess.run(command, check=True)
    packages = Path(sysconfig.get_path("purelib"))
    site = home / packages.relative_to(sys.prefix)
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    (site / "others.pth").write_text(f"{packages}\n")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    # Reading the types of torch and transformers takes 20 seconds without a cache.
    cache = ROOT / ".mypy_cache" / "of_a_user"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--config-file", ""),
            *("--python-executable", str(home / "bin" / "python"), "--cache-dir", str(cache)),
            "script.py",
        ],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines: dict[int, str] = {}
    for number, said in re.findall(r"^script\.py:(\d+): (.*)$", done.stdout, re.MULTILINE):
        lines[int(number)] = lines.get(int(number), "") + said + "\n"
    marks = {
        number: line.rpartition("  # ")[2]
        for number, line in enumerate(SCRIPT.splitlines(), 1)
        if "  # " in line
    }
    assert set(lines) == set(marks), done.stdout + done.stderr
    for number, mark in marks.items():
        assert re.search(SAYS[mark], lines[number]), (mark, lines[number])
