"""The report of a real 200-step run: how large it is, whether a browser shows all of it, and what writing it costs.

Trains the bundled model for `--steps` steps of 4 x 4 responses with an evaluation every 50 (one to two minutes), then
opens report.html in headless Chromium: phone and desktop, light and dark. Prints bytes, pictures shown, console
messages, requests, the widest scroll beyond the screen, and the share of the run that reports took while it went on.
Exit code 1 where the page is larger than 5 MB, a picture is missing, or the browser has anything to say.

    python benchmarks/report_size.py [--steps 200] [--folder runs/report_size] [--pictures] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 5_000_000  # bytes
SCREENS = [(390, 844, "light"), (390, 844, "dark"), (1280, 900, "light"), (1280, 900, "dark")]
FLAGS = (
    "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync "
    "--no-first-run"
).split()


def train(folder: Path, steps: int) -> dict[str, float]:
    """A real run; the seconds of its reports and of all of it."""
    from mmft.recipe import load_recipe
    from mmft.training import run
    from mmft.training.summary import LiveReport

    lives: list[LiveReport] = []
    begin = LiveReport.__init__

    def kept(self, *arguments, **options):
        begin(self, *arguments, **options)
        lives.append(self)

    LiveReport.__init__ = kept
    sizes = [f"train.steps={steps}", "train.save_every=50", "train.micro_prompts=null", "eval.every=50"]
    sizes += ["eval.rows=256", "rollout.prompts_per_step=4", "rollout.num_generations=4", f"output.dir={folder}"]
    summary = run.run(load_recipe(ROOT / "recipes" / "caption_ppo.yaml", sizes))
    return {"report_seconds": lives[-1].seconds, "run_seconds": summary["seconds"]}


def look(page_file: Path, folder: Path | None) -> dict[str, Any]:
    """What a browser makes of the page, worst of all screens; `folder` gets a picture of each."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("no Chromium is installed; this benchmark needs one")
    said: list[str] = []
    asked: list[str] = []
    pictures, shown, beyond = [], [], []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=FLAGS)
        for width, height, scheme in SCREENS:
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
            page = context.new_page()
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("request", lambda one: asked.append(one.url) if not one.url.startswith(("file:", "data:")) else 0)
            page.goto(page_file.as_uri())
            page.evaluate("for (const i of document.images) i.loading = 'eager'")
            page.wait_for_function("[...document.images].every(i => i.complete)")
            pictures.append(page.evaluate("document.images.length"))
            shown.append(page.evaluate("[...document.images].filter(i => i.naturalWidth > 0).length"))
            beyond.append(page.evaluate("document.documentElement.scrollWidth") - width)
            if folder:
                page.screenshot(path=folder / f"report_{width}_{scheme}.png", full_page=True)
            context.close()
        browser.close()
    return {
        "pictures": max(pictures),
        "pictures_shown": min(shown),
        "console_messages": said,
        "requests": asked,
        "pixels_beyond_the_screen": max(0, *beyond),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="run folder; default: a temporary one")
    parser.add_argument("--pictures", action="store_true", help="save a picture of each screen beside report.html")
    parser.add_argument("--json", metavar="FILE", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as aside:
        folder = options.folder or Path(aside) / "run"
        found: dict[str, Any] = {"steps": options.steps} | train(folder, options.steps)
        page = folder.resolve() / "report.html"
        found |= {"bytes": page.stat().st_size} | look(page, folder if options.pictures else None)
    print(f"report of {options.steps} steps: {found['bytes']:,} bytes (limit {LIMIT:,})")
    print(f"pictures shown: {found['pictures_shown']} of {found['pictures']}, on {len(SCREENS)} screens")
    print(f"console messages: {len(found['console_messages'])}, requests: {len(found['requests'])}")
    print(f"pixels beyond the screen: {found['pixels_beyond_the_screen']}")
    share = found["report_seconds"] / found["run_seconds"]
    print(f"reports while it trained: {found['report_seconds']:.2f} of {found['run_seconds']:.1f} s ({share:.2%})")
    for text in [*found["console_messages"], *found["requests"]]:
        print("  ", text)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    whole = found["pictures_shown"] == found["pictures"] > 0 and found["bytes"] <= LIMIT
    return 0 if whole and not found["console_messages"] and not found["requests"] else 1


if __name__ == "__main__":
    sys.exit(main())
