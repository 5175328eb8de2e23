"""How long `mmft caption` takes on a CPU with the bundled model: the whole process, from a cold start to the caption.

Draws one held-out scene and captions it in `--repeats` fresh processes, one after another, by the bundled model alone.
Wall time and processor time of the whole process are measured from outside. Prints the medians and each run; exits with
1 if the median of the wall time is 5 seconds or more. Nearly all of it is the import of torch and transformers.

    python benchmarks/caption_seconds.py [--repeats 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mmft.data import load_rows

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 5.0  # seconds


def cost(picture: Path) -> dict[str, float | str]:
    """Seconds of a fresh process that captions the picture, and what it said."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "mmft.cli", "caption", str(picture)]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": wall, "processor": processor, "caption": said.partition(": ")[2].strip()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "scene.png"
        load_rows("scenes", "test", limit=1)[0]["image"].save(picture)
        runs = [cost(picture) for _ in range(options.repeats)]
    found = {kind: statistics.median(run[kind] for run in runs) for kind in ("wall", "processor")}
    print(f"{runs[0]['caption']}\n{'':12}{'wall':>8}{'processor':>11}   seconds")
    for i, run in enumerate(runs, 1):
        print(f"{f'process {i}':12}{run['wall']:>8.2f}{run['processor']:>11.2f}")
    print(f"{'median':12}{found['wall']:>8.2f}{found['processor']:>11.2f}   (allowed: {LIMIT:g} of wall time)")
    if options.json:
        options.json.write_text(json.dumps(found | {"limit": LIMIT, "runs": runs}, indent=1) + "\n")
    sys.exit(found["wall"] >= LIMIT)


if __name__ == "__main__":
    main()
