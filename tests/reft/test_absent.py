"""Without an extra, the package can be listed, documented and star-imported, and using a class that
needs the extra raises an error. Each test runs in a process without the extra."""

from __future__ import annotations

import subprocess
import sys

import pytest

HIDE = """
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "trl":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
import reft

def refused(use):
    try:
        use()
    except ImportError as error:
        assert "pip install 'reft[trl]'" in str(error) and "\\n" not in str(error), error
    else:
        raise AssertionError("it was used")
"""

BROKEN = """
import sys, types
import importlib.machinery

class Lazy(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError("Failed to import trl.trainer because of:\\nNo module named 'datasets'")

trl = Lazy("trl")
trl.__spec__ = importlib.machinery.ModuleSpec("trl", None)
sys.modules["trl"] = trl
import reft
"""

CASES = {
    "listed": """
import inspect, pydoc
exec("from reft import *", space := {})
assert {"ReftSFTTrainer", "ReftDPOTrainer", "ReftModel"} <= set(space)
members = dict(inspect.getmembers(reft))
assert set(reft.__all__) <= set(members) and set(reft.__all__) <= set(dir(reft))
assert hasattr(reft, "ReftSFTTrainer") and not hasattr(reft, "ReftSFTTrainers")
text = pydoc.plain(pydoc.render_doc(reft))
assert "class ReftDPOTrainer" in text and "pip install 'reft[trl]'" in text
""",
    "looked at": """
import inspect, pydoc
for name in ("ReftSFTTrainer", "ReftDPOTrainer"):
    kind = getattr(reft, name)
    assert kind is getattr(reft, name) and isinstance(kind, type)
    assert (kind.__name__, kind.__module__) == (name, "reft.train.trl")
    assert name in repr(kind) and not isinstance(reft, kind)
    assert inspect.getmembers(kind) and inspect.signature(kind)
    assert "pip install 'reft[trl]'" in pydoc.plain(pydoc.render_doc(kind))
""",
    "used": """
for kind in (reft.ReftSFTTrainer, reft.ReftDPOTrainer):
    class Mine(kind):
        def train(self):
            return 1
    for each in (kind, Mine):
        refused(lambda: each())
        refused(lambda: each(model=None, args=None))
        refused(lambda: each.evaluate)
        refused(lambda: each.from_pretrained("folder"))
refused(lambda: __import__("reft.train.trl"))
""",
    "installed meanwhile": """
stand_in = reft.ReftSFTTrainer
refused(stand_in)
sys.meta_path.pop(0)
assert reft.ReftSFTTrainer is not stand_in
from trl import SFTTrainer
assert issubclass(reft.ReftSFTTrainer, SFTTrainer) and reft.ReftSFTTrainer is reft.ReftSFTTrainer
""",
}


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("case", CASES)
def test_without_trl(case):
    if case == "installed meanwhile":
        pytest.importorskip("trl")
    run(HIDE + CASES[case])


def test_a_trl_that_lacks_something_itself():
    """The error shows why TRL cannot be imported, and is raised only on use."""
    run(
        BROKEN
        + """
exec("from reft import *")
try:
    reft.ReftSFTTrainer()
except ImportError as error:
    assert "pip install 'reft[trl]'" in str(error) and "datasets" in str(error), error
    assert "\\n" not in str(error)
else:
    raise AssertionError("it was used")
"""
    )


def test_nothing_is_imported_for_it():
    run("import sys, reft; assert not {'trl', 'torch', 'reft.absent'} & set(sys.modules)")
