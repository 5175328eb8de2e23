"""What all verbs share: help, exit codes, mistypes, completion, progress, Ctrl-C, readers that go away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from typer.core import TyperGroup
from typer.main import get_command

import mmft
import mmft.hub
from mmft.cli import app, main
from mmft.cli.page import PAGE, written_anew
from mmft.cli.progress import progress


def every_verb(command=None, path=()):
    """The words of every verb, those of groups included."""
    for name, below in (command or get_command(app)).commands.items():
        yield [*path, name]
        if isinstance(below, TyperGroup):
            yield from every_verb(below, (*path, name))


@pytest.mark.parametrize("verb", every_verb(), ids=" ".join)
def test_every_verb_explains_itself_with_examples(verb, capsys):
    assert main([*verb, "--help"]) == 0
    shown = capsys.readouterr().out
    if verb != ["recipe"]:  # its own verbs have them
        assert f"mmft {' '.join(verb)}".removesuffix(" check") in shown.partition("Examples:")[2]


def test_the_app_lists_verbs_in_the_order_of_work(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    panels = ["Before training", "Look at a result", "Use it", "Publish"]
    places = [shown.index(f"─ {panel}") for panel in panels]
    assert places == sorted(places) and "2 wrong input" in shown


def test_the_page_of_the_documentation_is_current():
    page = PAGE.read_text(encoding="utf-8")
    assert written_anew(page) == page, "python -m mmft.cli.page writes it anew"
    assert "`--method <greedy, beam, sample, best-of>`" in page


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mmft {mmft.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["psuh", "run", "ann/run"], "'push'"),
        (["push", "run", "ann/run", "--publc"], "--public"),
        (["doctor", "reward", "recipes/caption_ppo.yaml"], "'rewards'"),
        (["doctor", "recipes/caption_ppo.yaml", "--quik"], "--quick"),
    ],
)
def test_mistypes_end_with_2_and_the_nearest(arguments, near, capsys):
    assert main(arguments) == 2
    assert near in capsys.readouterr().err


# --- completion


def complete(words: str) -> tuple[list[str], str]:
    """What the shell would offer, and whether that took torch."""
    environment = os.environ | {"_MMFT_COMPLETE": "complete_bash", "COMP_WORDS": words}
    environment |= {"COMP_CWORD": str(words.count(" "))}
    code = "import sys; from mmft.cli import main; main([]); print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    return done.stdout.split(), done.stderr.strip()


def test_the_shell_completes_verbs_and_options_without_torch():
    assert complete("mmft pu") == (["push", "pull"], "False")
    assert complete("mmft doctor me") == (["memory"], "False")
    assert complete("mmft push --dr") == (["--dry-run"], "False")


def test_completion_can_be_shown(capsys):
    assert main(["--show-completion", "bash"]) == 0
    assert "_MMFT_COMPLETE" in capsys.readouterr().out


# --- progress


def test_progress_is_for_terminals_and_never_on_standard_output(capsys, monkeypatch):
    with progress(3, "reading") as advance:
        advance(2)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich: as on a terminal
    with progress(3, "reading") as advance:
        advance(2)
        advance(1, "writing")
    shown = capsys.readouterr()
    assert not shown.out and "reading" in shown.err and "3/3" in shown.err and "writing" in shown.err


def test_results_reach_the_file_while_the_bar_is_on_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # standard error is a terminal, standard output is not
    with progress(3, "reading") as advance:
        print("a.jpg: a dog")
        advance(3)
    shown = capsys.readouterr()
    assert shown.out == "a.jpg: a dog\n" and "a dog" not in shown.err and "3/3" in shown.err


# --- ends


@pytest.mark.parametrize(
    "words",
    [
        ["caption", "nowhere.jpg", "--json"],
        ["evaluate", "nowhere", "--json"],
        ["compare", "nowhere", "nobody", "--output"],
        ["recipe", "schema", "--output"],
        ["doctor", "recipes/caption_ppo.yaml", "--json"],
        ["doctor", "memory", "recipes/caption_ppo.yaml", "model.name=nowhere", "--json"],
        ["doctor", "rewards", "recipes/caption_ppo.yaml", "data.name=nowhere", "--json"],
    ],
    ids=" ".join,
)
def test_a_file_that_cannot_be_written_is_said_before_the_work(words, tmp_path, capsys):
    (tmp_path / "file").touch()
    for place, why in ((tmp_path, "is a folder"), (tmp_path / "file" / "x.json", "cannot be written")):
        assert main([*words, str(place)]) == 2
        said = capsys.readouterr()
        assert why in said.err and "nowhere" not in said.err and not said.out


def test_the_folder_of_a_file_is_made(tmp_path):
    assert main(["recipe", "schema", "--output", str(tmp_path / "new" / "schema.json")]) == 0
    assert (tmp_path / "new" / "schema.json").stat().st_size > 1000


def test_no_repository_has_such_a_name(tmp_path, capsys):
    assert main(["pull", "user", str(tmp_path / "out")]) == 2
    assert "expected user/name" in capsys.readouterr().err


def test_ctrl_c_is_130_without_a_word(monkeypatch, capsys):
    def pressed(*_):
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(mmft.hub, "pull", pressed)
    assert main(["pull", "ann/run", "out"]) == 130
    assert capsys.readouterr() == ("", "")
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_that_a_library_swallows_is_130_too(monkeypatch, capsys):
    def swallowed(*_):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("half a library") from None

    monkeypatch.setattr(mmft.hub, "pull", swallowed)
    assert main(["pull", "ann/run", "out"]) == 130
    assert capsys.readouterr() == ("", "")

    def goes_on(*_):
        with progress(2, "reading") as advance:
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                pass
            advance(1)
            raise AssertionError("went on")

    monkeypatch.setattr(mmft.hub, "pull", goes_on)
    assert main(["pull", "ann/run", "out"]) == 130
    monkeypatch.setattr(mmft.hub, "pull", lambda *_: "fetched")
    assert main(["pull", "ann/run", "out"]) == 0  # forgotten


@pytest.mark.parametrize("arguments", [["recipe", "schema"], ["--version"]])  # more and less than a buffer holds
def test_a_reader_that_goes_away_is_no_error(arguments):
    command = [sys.executable, "-m", "mmft.cli", *arguments]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=buffered)
    running.stdout.close()
    assert running.stderr.read() == b"" and running.wait(60) == 0


def test_a_missing_library_is_one_line(monkeypatch, capsys):
    def pull(*_):
        raise ImportError("No module named 'av'")

    monkeypatch.setattr(mmft.hub, "pull", pull)
    assert main(["pull", "ann/run", "out"]) == 2
    assert capsys.readouterr().err == "error: No module named 'av'\n"
