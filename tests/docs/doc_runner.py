"""Runs the commands and the Python of the documentation, in this process and with small sizes.

A command is run for real wherever that can be done on one machine without a GPU. What cannot is in `ELSEWHERE`, with
what is checked instead. A command that nobody here knows is an error.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import os
import re
import runpy
import subprocess
import sys
import tomllib
import webbrowser
from collections.abc import Callable, Sequence
from functools import cache
from glob import glob
from pathlib import Path
from typing import Any

import pytest
import shellingham
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from doc_blocks import ROOT, Block, Command
from doc_given import GIVEN

from mmft import PPOTrainer, data
from mmft.cli import main
from mmft.evaluation.suite import SUITE
from mmft.recipe import load_recipe
from mmft.recipe.preference import load_preference_recipe
from mmft.training import memory

# Sizes of a run; whatever a command says about them comes first, and is checked, but not waited for.
SIZES = ["train.steps=2", "rollout.prompts_per_step=2", "rollout.num_generations=2", "train.micro_prompts=null"]
SIZES += ["rollout.max_completion_length=8", "algorithm.num_mini_batches=1", "data.train_rows=16", "eval.rows=4"]
SIZES += ["eval.every=0", "train.save_every=1", "train.value_learning_rate=1e-3"]
WARM_START = ["warm_start.max_steps=1", "warm_start.batch_size=4", "warm_start.save_every=0"]
HEAD = ["train.steps=2", "train.batch_size=4", "pairs.train_rows=8", "pairs.held_out_rows=8", "train.save_every=0"]
STEPS = {"max_steps": 2, "prompts_per_step": 2, "num_generations": 2, "micro_prompts": None, "eval_rows": 4}
ROWS = 12
MEASURE = memory.measured_base
WITH_JAVA = "mmft evaluate runs/caption_photos"  # the one evaluation with every metric
RAN, CHECKED = "run", "checked otherwise"


class Parsed(Exception):
    """A benchmark has read its options."""


def run_command(command: Command) -> str:
    """Runs one command; returns RAN, or CHECKED where it could not be.

    Raises:
        AssertionError: it failed; what it printed is in the message.
    """
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        patch.setattr(webbrowser, "open", lambda url: True)
        patch.setattr(shellingham, "detect_shell", lambda: ("bash", "/bin/bash"))  # the reader's, not the tests'
        patch.setattr(memory, "measured_base", base_memory)
        if WITH_JAVA not in command.text:
            without_java(patch)
        for name, value in command.environment:
            patch.setenv(name, value)
        try:
            how = _run(list(command.words), patch, command)
        except (SystemExit, Exception) as error:
            raise AssertionError(
                f"{command.page}:{command.line}: {command.text}\n{said.getvalue()[-3000:]}\n{error!r}"
            ) from error
    if command.output is not None:
        Path(command.output).write_text(said.getvalue())
    return how


def _run(words: list[str], patch: pytest.MonkeyPatch, command: Command) -> str:
    words = [name for word in words for name in (sorted(glob(word)) if "*" in word else [word])]
    words[0] = words[0].removeprefix(".venv/bin/")
    for pattern, check in ELSEWHERE.items():
        if re.match(pattern, " ".join(words)):
            check(words)
            return CHECKED
    if words[0] == "mmft":
        return _verb(words[1:])
    if words[:2] == ["accelerate", "launch"]:
        return _launch(words[2:], patch)
    if words[0] == "python" and words[1].startswith("recipes/"):
        return _recipe(words[1], words[2:], patch)
    if words[0] == "python" and words[1].startswith("benchmarks/"):
        return _benchmark(words[1:], patch)
    if words[:2] == ["python", "-m"]:
        patch.setattr(sys, "argv", words[2:])
        return _ended(lambda: runpy.run_module(words[2], run_name="__main__", alter_sys=True))
    if words[0] == "export":
        return _export(command.text, words[1].partition("=")[0])
    if words[0] in ("ls", "mkdir", "cp", "cat", "head"):
        subprocess.run(words, check=True, capture_output=True)
        return RAN
    raise AssertionError("nobody knows how to run this: teach tests/docs/doc_runner.py, or mend the page")


@cache
def measured_base() -> int:
    return MEASURE(load_recipe("recipes/caption_ppo.yaml", SIZES))


def base_memory(recipe: object) -> int:
    """Memory before a run, which `mmft doctor` measures in a process of its own: here once for all recipes."""
    return measured_base()


def without_java(patch: pytest.MonkeyPatch) -> None:
    """Leaves out what starts a Java process of several seconds each time."""
    for name in ("meteor", "spice"):
        patch.delitem(SUITE, name, raising=False)


# --- the command line


def _verb(arguments: list[str]) -> str:
    verb = arguments[0]
    fine = {0}
    if verb == "doctor":
        fine = {0, 1}  # 1 = it found something, which is its work
        if "memory" not in arguments and any(word.endswith(".yaml") for word in arguments):
            arguments = [*arguments, *_sizes(arguments)]
    if (verb == "evaluate" and "--references" not in arguments) or arguments[:2] == ["doctor", "rewards"]:
        arguments = [*arguments, "--rows", "4"]  # the last one counts
    code = main(arguments)
    assert code in fine, f"exit code {code}"
    return RAN


# --- recipes


def _launch(words: list[str], patch: pytest.MonkeyPatch) -> str:
    options = launch_command_parser().parse_args(words)
    script, arguments = options.training_script, options.training_script_args
    several = (options.num_processes or 1) > 1
    if options.config_file:
        file = load_config_from_file(options.config_file)
        several = several or file.num_processes > 1 or not file.use_cpu
    if several:
        _read_recipe(script, arguments)
        return CHECKED
    return _recipe(script, arguments, patch)


def _read_recipe(script: str, arguments: Sequence[str]) -> list[str]:
    """Checks the command's own recipe and overrides; returns the sizes to append."""
    words = [word for word in arguments if not word.startswith("--")]
    files = [word for word in words if "=" not in word]
    load = load_preference_recipe if script.endswith("train_preference.py") else load_recipe
    path = files[0] if files else str(Path(script).with_suffix(".yaml"))
    load(path, [word for word in words if "=" in word])
    return HEAD if load is load_preference_recipe else _sizes([path, *words])


def _sizes(words: Sequence[str]) -> list[str]:
    """Overrides that make a recipe small; trackers as the command says, else none."""
    path = next(word for word in words if word.endswith(".yaml") and "=" not in word)
    recipe = load_recipe(path, [word for word in words if re.match(r"[\w.]+=", word)])
    told = any(word.startswith("output.trackers=") for word in words)
    return [*SIZES, *([] if told else ["output.trackers=[]"]), *(WARM_START if recipe.warm_start else [])]


def _recipe(script: str, arguments: list[str], patch: pytest.MonkeyPatch) -> str:
    patch.setattr(sys, "argv", [script, *arguments, *_read_recipe(script, arguments)])
    return _ended(lambda: runpy.run_path(script, run_name="__main__"))


def _ended(call: Callable[[], object]) -> str:
    try:
        call()
    except SystemExit as end:
        assert end.code in (0, None), f"exit code {end.code}"
    return RAN


# --- Python


def run_python(block: Block, names: dict[str, Any]) -> None:
    """Runs one block with the names of its page; trainers take few steps, data sets few rows."""
    if len(names) == 1 and block.page in GIVEN:
        exec(GIVEN[block.page], names)
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        start, read = PPOTrainer.__init__, data.load_rows

        def small_trainer(*given, **named):
            call = inspect.signature(start).bind(*given, **named)
            args = call.arguments.get("args") or call.arguments["self"].config_class()
            for name, value in STEPS.items():
                setattr(args, name, value)
            call.arguments["args"] = args
            start(*call.args, **call.kwargs)

        def few_rows(name, split, limit=None, *others, **named):
            return read(name, split, min(limit or ROWS, ROWS), *others, **named)

        without_java(patch)
        patch.setattr(PPOTrainer, "__init__", small_trainer)
        patch.setattr(data, "load_rows", few_rows)
        try:
            exec(compile("\n" * (block.line - 1) + block.text, str(ROOT / block.page), "exec"), names)
        except (SystemExit, Exception) as error:
            raise AssertionError(f"{block.page}:{block.line}:\n{said.getvalue()[-2000:]}\n{error!r}") from error


# --- the rest


def _benchmark(words: list[str], patch: pytest.MonkeyPatch) -> str:
    """Minutes to hours each: its options are read by its own parser, and there it is ended."""
    read = argparse.ArgumentParser.parse_args

    def parse(self, *given, **named):
        read(self, *given, **named)
        raise Parsed

    patch.setattr(argparse.ArgumentParser, "parse_args", parse)
    patch.setattr(sys, "argv", words)
    patch.syspath_prepend("benchmarks")
    try:
        runpy.run_path(words[0], run_name="__main__")
    except Parsed:
        return CHECKED
    raise AssertionError(f"{words[0]} has read no options")


def _export(text: str, name: str) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shell = subprocess.run(
        ["bash", "-c", f'{text}; printf %s "${name}"'], env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert shell.returncode == 0 and shell.stdout, shell.stderr
    os.environ[name] = shell.stdout
    return RAN


def parse_bash(block: Block) -> None:
    shell = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
    assert shell.returncode == 0, f"{block.page}:{block.line}: {shell.stderr}"


def _make(words: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert all(word in targets for word in words[1:] if "=" not in word), words


def _pip(words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"\[([\w,-]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(project["optional-dependencies"]), extras


def _pytest(words: list[str]) -> None:
    for word in words[3:]:
        path, _, name = word.partition("::")
        if path.startswith("tests/"):
            assert f"def {name}" in (ROOT / path).read_text() if name else (ROOT / path).exists(), word


def _vllm(words: list[str]) -> None:
    page = (ROOT / "docs/generation.md").read_text()
    assert all(word in page for word in words if word.startswith("--"))


def _server(words: list[str]) -> None:
    """All but listening: what is served is put together by the module's own functions."""
    from reward_models import serve

    serve._rewards(serve._options(words[3:]))


# pattern -> what is checked instead, because the command needs other machines, installs, or never ends
ELSEWHERE: dict[str, Callable[[list[str]], None]] = {
    r"make ": _make,  # installs, or is the run of tests itself: the target exists
    r"\.ci/run": lambda words: None,  # runs these tests
    r"python -m pip|pip ": _pip,  # installs: the extras exist
    r"python -m pytest": _pytest,  # the files and tests named exist
    r"vllm serve": _vllm,  # needs vLLM and a GPU
    r"python -m reward_models\.serve": _server,  # never ends
}
