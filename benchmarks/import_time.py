"""What `import reward_models` costs next to `import numpy`, in fresh processes.

Runs four programs in turn, `--repeats` times each: nothing, `import numpy`, `import reward_models`, and the import of
its metrics and of their combination by name (which is what an export that is loaded late would hide). Wall time and
processor time of the whole process are measured from outside; the medians of the empty program are taken off. Prints
milliseconds and the ratio to numpy; exits with 1 if one of the ratios of wall time is above 1.5.

    python benchmarks/import_time.py [--repeats 25] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = {
    "nothing": "pass",
    "numpy": "import numpy",
    "reward_models": "import reward_models",
    "metrics by name": "from reward_models import Bleu, CiderD, DocumentFrequencies, WeightedRewards, build_rewards",
}
LIMIT = 1.5


def cost(program: str) -> dict[str, float]:
    """Seconds of a fresh interpreter that runs the program."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"wall": wall, "processor": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--json", metavar="FILE", type=Path)
    options = parser.parse_args()
    for program in PROGRAMS.values():  # writes .pyc files, fills the disk cache
        cost(program)
    found = defaultdict(list)
    for _ in range(options.repeats):
        for name, program in PROGRAMS.items():  # in turn, so that a busy spell hits all alike
            for clock, value in cost(program).items():
                found[name, clock].append(value)
    median = {key: statistics.median(values) for key, values in found.items()}
    print(f"milliseconds, medians of {options.repeats} fresh processes, those of an empty one taken off")
    print(f"{'import':<16} {'wall':>7} {'ratio':>6} {'processor':>10} {'ratio':>6}")
    report: dict[str, dict[str, float]] = {}
    for name in list(PROGRAMS)[1:]:
        row = report[name] = {}
        for clock in ("wall", "processor"):
            row[clock] = median[name, clock] - median["nothing", clock]
            row[f"{clock} ratio"] = row[clock] / report["numpy"][clock]
        print(
            f"{name:<16} {row['wall'] * 1e3:7.1f} {row['wall ratio']:6.2f} "
            f"{row['processor'] * 1e3:10.1f} {row['processor ratio']:6.2f}"
        )
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(max(row["wall ratio"] for row in report.values()) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
