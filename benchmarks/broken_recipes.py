"""Broken recipes, launched as a user launches them: each must end with its one message, at its line, and exit code 2.

Every recipe of tests/recipe/broken_table.py (typos, wrong types, ranges, impossible combinations, hostile YAML,
`extends`, overrides) is given to its script in a fresh process. Prints how many got the right message at the right
place, and the seconds of the slowest; exits with 1 if one did not, or took longer than 2 seconds.

    python benchmarks/broken_recipes.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "recipe"))

from broken_table import GROUPS, Broken  # noqa: E402

LIMIT = 2.0  # seconds


def launch(broken: Broken, folder: Path) -> tuple[str, float]:
    """What was wrong with how the launch ended (nothing, if it is right), and its seconds."""
    path = broken.write(folder)
    script = "train_preference" if "pairs:" in str(broken.text) else "caption_ppo"
    command = [sys.executable, str(ROOT / "recipes" / f"{script}.py"), str(path), *broken.overrides]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    *problems, last = done.stderr.splitlines() or [""]
    if done.returncode != 2 or not last.endswith("nothing was started."):
        return f"exit code {done.returncode}: {last}", seconds
    return broken.missed(problems, folder), seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", type=Path)
    options = parser.parse_args()
    report, wrong, slowest = {}, [], 0.0
    print(f"{'group':<12} {'right':>7} {'slowest':>8}")
    for group, cases in GROUPS.items():
        found = {}
        for name, broken in cases.items():
            with tempfile.TemporaryDirectory() as scratch:
                found[name] = launch(broken, Path(scratch))
        wrong += [f"{group}: {name}: {said}" for name, (said, _) in found.items() if said]
        right, longest = sum(not said for said, _ in found.values()), max(seconds for _, seconds in found.values())
        report[group] = {"right": right, "of": len(found), "slowest_seconds": round(longest, 3)}
        slowest = max(slowest, longest)
        print(f"{group:<12} {f'{right}/{len(found)}':>7} {longest:7.2f}s")
    right, total = (sum(row[key] for row in report.values()) for key in ("right", "of"))
    print(f"{'together':<12} {f'{right}/{total}':>7} {slowest:7.2f}s (limit {LIMIT:g})")
    print("\n".join(wrong))
    if options.json:
        whole = {"right": right, "of": total, "slowest_seconds": round(slowest, 3)}
        options.json.write_text(json.dumps({"together": whole, "groups": report, "wrong": wrong}, indent=1))
    return int(bool(wrong) or slowest > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
