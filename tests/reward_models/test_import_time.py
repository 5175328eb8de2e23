"""`import reward_models` must cost about what `import numpy` costs; benchmarks/import_time.py measures it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Slow parts of the standard library that numpy does without.
SLOW = {"asyncio", "multiprocessing", "concurrent.futures", "http.client", "urllib.request", "xml", "unittest", "ssl"}


def loaded(program: str) -> set[str]:
    code = f"{program}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


@pytest.fixture(scope="module")
def more():
    """The modules that `import reward_models` loads and `import numpy` does not."""
    found = loaded("import reward_models") - loaded("import numpy, json")
    assert "reward_models" in found
    return found


def test_nothing_but_the_standard_library(more):
    outside = {name.split(".")[0] for name in more} - sys.stdlib_module_names - {"reward_models"}
    assert not outside, f"import reward_models also loads {sorted(outside)}; import them where they are used"


def test_nothing_slow(more):
    assert not more & SLOW, f"import reward_models also loads {sorted(more & SLOW)}; import them where they are used"


def test_using_a_metric_loads_nothing_else():
    program = (
        "from reward_models import CiderD, DocumentFrequencies\n"
        "CiderD(DocumentFrequencies.from_references([['a'], ['b']])).score(['a'], [['a']])"
    )
    found = loaded(program) - loaded("import numpy, json")
    assert not {name.split(".")[0] for name in found} - sys.stdlib_module_names - {"reward_models", "numpy"}
