"""Rewards in a child process: what they return, and every way in which they can fail."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reward_models.isolation import Isolated

REWARDS = """
import asyncio, os, signal, subprocess, sys, time
from typing import NamedTuple

def length(completions, scale=1.0, **columns):
    print("noise on stdout" * 100)
    return [None if not text else scale * len(text) for text in completions]

async def awaited(completions, **columns):
    await asyncio.sleep(0)
    return [1.0] * len(completions)

class Prefix:
    signature = "prefix|v:1"
    def __init__(self, letter): self.letter = letter
    def __call__(self, completions, **columns): return [float(text.startswith(self.letter)) for text in completions]
    def increments(self, pieces, **columns): return [[float(len(p)) for p in row] for row in pieces]

def brightest(image, **columns):
    return [float(max(picture.convert("L").getdata())) for picture in image]

def fails_on_b(completions, **columns):
    if "b" in completions: raise KeyError("no b here")
    return [0.0] * len(completions)

def fails_in_batches(completions, **columns):
    if len(completions) > 1: raise ZeroDivisionError
    return [0.0]

def slow_search(completions, **columns):
    if len(completions) == 1: time.sleep(60)
    raise KeyError("first")

def hangs(completions, pid_file=None, **columns):
    if completions[0] != "hang": return [1.0] * len(completions)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    if pid_file: open(pid_file, "w").write(f"{os.getpid()} {child.pid}")
    while True: pass

def dies(completions, **columns):
    how = completions[0]
    if how == "exit": os._exit(7)
    if how == "kill": os.kill(os.getpid(), signal.SIGKILL)
    if how == "segfault": import ctypes; ctypes.string_at(0)
    return [float(os.getpid())] * len(completions)

def dies_of_one(completions, **columns):
    for how in completions: dies([how])
    return [1.0] * len(completions)

def hangs_on_one(completions, **columns):
    for text in completions: time.sleep({"hang": 60, "slow": 0.4}.get(text, 0))
    return [1.0] * len(completions)

def modules(completions, **columns):
    return [float("torch" in sys.modules)] * len(completions)

def forks(completions, hide=False, **columns):
    if hide: os.getpid = lambda pid=os.getpid(): pid
    if not os.fork(): return [-1.0] * len(completions)
    time.sleep(0.3)
    return [1.0] * len(completions)

def says_two_lines(completions, **columns):
    raise ValueError("one\\ntwo")

def odd(completions, **columns):
    return ["text", [1.0], object(), float("nan"), True]
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(REWARDS)
    return path


def running(pid: int) -> bool:
    """A zombie counts as gone: it holds nothing, and its parent reaps it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids: list[int], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(running, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(running, pids))


def test_options_none_and_noise(file, capfd):
    """Printing must not reach the channel, nor the parent's stdout; None must stay None."""
    with Isolated(f"{file}:length", {"scale": 2.0}) as reward:
        assert reward(prompts=["p"] * 3, completions=["ab", "", "abc"]) == [4.0, None, 6.0]
    out, err = capfd.readouterr()
    assert out == "" and "noise on stdout" in err


def test_async_function(file):
    with Isolated(f"{file}:awaited") as reward:
        assert [reward(completions=["a", "b"]) for _ in range(2)] == [[1.0, 1.0]] * 2


def test_class_with_signature_and_increments(file):
    with Isolated(f"{file}:Prefix", {"letter": "x"}) as reward:
        assert reward(completions=["xa", "a"]) == [1.0, 0.0]
        assert reward.signature == "prefix|v:1"
        rows = reward.increments([["a", "bc", ""], ["d"]], references=[["r"], ["r"]])
        assert [row.tolist() for row in rows] == [[1.0, 2.0, 0.0], [1.0]]
        assert all(row.dtype == np.float64 for row in rows)
    with Isolated(f"{file}:length", {"scale": 2.0}) as plain:
        assert not hasattr(plain, "increments") and "scale:2.0" in plain.signature


def test_scored_columns_come_back_as_scored(tmp_path):
    """The logged columns of a reward must not be lost on the way."""
    from reward_models.rewards import Scored

    path = tmp_path / "scored.py"
    path.write_text(
        "import numpy as np\nfrom reward_models.rewards import Scored\n"
        "def f(completions, **_): return Scored(np.array([1.0, 2.0]), {'std': [0.5, None]})\n"
    )
    with Isolated(f"{path}:f") as reward:
        got = reward(completions=["a", "b"])
    assert isinstance(got, Scored) and list(got.values) == [1.0, 2.0] and got.logged == {"std": [0.5, None]}


def test_pictures_travel(file):
    """Eight pictures of one megapixel are far more than a pipe's buffer: sending must not deadlock."""
    pictures = [Image.new("RGB", (1024, 1024), (i, i, i)) for i in range(8)]
    with Isolated(f"{file}:brightest", timeout=20) as reward:
        assert reward(completions=["c"] * 8, image=pictures) == [float(i) for i in range(8)]


def test_a_raise_names_the_row_and_shows_the_traceback(file):
    with Isolated(f"{file}:fails_on_b") as reward:
        with pytest.raises(RuntimeError, match=r"fails_on_b' raised \(row 2 \(id 'z'\) of 3\)") as caught:
            reward(completions=["a", "c", "b"], id=["x", "y", "z"])
        assert "KeyError: 'no b here'" in str(caught.value) and "mine.py" in str(caught.value)
        pid = reward._process.popen.pid
        assert reward(completions=["a"]) == [0.0]
        assert reward._process.popen.pid == pid, "an exception is no reason for a new process"


def test_a_raise_that_no_row_causes_alone(file):
    with Isolated(f"{file}:fails_in_batches") as reward:
        with pytest.raises(RuntimeError, match="no row raises by itself of 2"):
            reward(completions=["a", "b"])


def test_the_search_for_the_row_keeps_the_time_limit(file):
    """The cause must survive a search that hangs."""
    with Isolated(f"{file}:slow_search", timeout=0.5) as reward:
        began = time.monotonic()
        with pytest.raises(RuntimeError, match="no row found before the time limit") as caught:
            reward(completions=["a", "b"])
        assert time.monotonic() - began < 5.5 and "KeyError: 'first'" in str(caught.value)


def test_a_hang_ends_in_time_and_leaves_no_process(file, tmp_path):
    pid_file = tmp_path / "pids"
    with Isolated(f"{file}:hangs", {"pid_file": str(pid_file)}, timeout=1.0) as reward:
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=r"hangs'.* 1 s for rows 0, 1,.* … \(20 rows\)"):
            reward(completions=["hang"] * 20)
        assert time.monotonic() - began < 6.0
        assert gone([int(pid) for pid in pid_file.read_text().split()], 1.0), "its own children must go with it"
        assert reward(completions=["on"]) == [1.0], "the next call starts a fresh child"


@pytest.mark.parametrize(
    ("how", "said"), [("exit", "exit code 7"), ("kill", "signal 9, SIGKILL"), ("segfault", "signal 11, SIGSEGV")]
)
def test_a_death_names_its_cause_and_the_next_call_works(file, how, said):
    with Isolated(f"{file}:dies") as reward:
        first = reward(completions=["pid"])
        with pytest.raises(RuntimeError, match=f"dies': its process .*{said}.* on row 0"):
            reward(completions=[how])
        assert reward(completions=["pid"]) != first


@pytest.mark.parametrize("how", ["exit", "segfault"])
def test_a_death_names_the_row_that_does_it(file, how):
    with Isolated(f"{file}:dies_of_one") as reward:
        with pytest.raises(RuntimeError, match=r"on rows 0 .*; row 2 \(id 'z'\) does it alone: the process "):
            reward(completions=["a", "b", how, "c"], id=["x", "y", "z", "w"])
        assert reward(completions=["a", "b"]) == [1.0, 1.0]


def test_a_hang_names_the_row_that_does_it_and_keeps_its_time(file):
    with Isolated(f"{file}:hangs_on_one", timeout=1.0) as reward:
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=r"1 s for rows 0 .*; row 3 \(id 'w'\) alone got no answer in \d"):
            reward(completions=["a", "b", "c", "hang"], id=["x", "y", "z", "w"])
        assert time.monotonic() - began < 6.0
        with pytest.raises(TimeoutError) as slow:  # together too slow, alone not: nobody is named
            reward(completions=["slow"] * 4)
        assert str(slow.value).endswith("its process was stopped")


def test_the_search_leaves_no_process(file):
    with Isolated(f"{file}:hangs_on_one", timeout=0.5) as reward:
        with pytest.raises(TimeoutError):
            reward(completions=["a", "hang"])
    assert gone(children()), "the process that looked for the row must go, too"


def children() -> list[int]:
    """Direct children of this process."""
    here = os.getpid()
    stats = {int(p.parent.name): p for p in Path("/proc").glob("[0-9]*/stat")}
    return [pid for pid, stat in stats.items() if parent_of(stat) == here and running(pid)]


def parent_of(stat: Path) -> int:
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except FileNotFoundError:
        return 0


def test_death_between_calls_is_mended(file):
    with Isolated(f"{file}:dies") as reward:
        pid = int(reward(completions=["pid"])[0])
        os.kill(pid, signal.SIGKILL)
        assert gone([pid])
        assert reward(completions=["pid"])[0] != pid


@pytest.mark.parametrize(
    ("source", "name", "said"),
    [
        ("import not_a_module_at_all", "f", "No module named 'not_a_module_at_all'"),
        ("raise SystemExit(3)", "f", "SystemExit: 3"),
        ("def reward(**_): pass", "rewrd", "did you mean 'reward'"),
        ("class C: pass", "C", "cannot be called"),
        ("import os; os._exit(4)", "f", r"exit code 4\) while loading"),
        ("import time; time.sleep(60)", "f", "not loaded within 1.5 s"),
    ],
)
def test_startup_errors_come_at_construction(tmp_path, source, name, said):
    path = tmp_path / "broken.py"
    path.write_text(source)
    with pytest.raises(ValueError, match=said):
        Isolated(f"{path}:{name}", startup_timeout=1.5)


def test_what_cannot_be_sent_is_named_and_odd_returns_are_left_to_the_caller(file):
    with Isolated(f"{file}:odd") as reward:
        with pytest.raises(ValueError, match="column 'callback' cannot be sent"):
            reward(completions=["a"], callback=[lambda: 0])
        text, nested, thing, nan, flag = reward(completions=["a"] * 5)
        assert (text, nested, flag) == ("text", [1.0], True) and np.isnan(nan) and thing.startswith("<object")


def test_threads_take_turns(file):
    """Answers must not be swapped between callers."""
    got: dict[int, list[float]] = {}
    with Isolated(f"{file}:length") as reward:
        threads = [
            threading.Thread(target=lambda n=n: got.update({n: reward(completions=["x" * n] * 3)})) for n in range(1, 9)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert got == {n: [float(n)] * 3 for n in range(1, 9)}


def test_survives_the_thread_that_started_it(file):
    """PR_SET_PDEATHSIG would kill the child here."""
    made: list[Isolated] = []
    thread = threading.Thread(target=lambda: made.append(Isolated(f"{file}:dies")))
    thread.start()
    thread.join()
    with made[0] as reward:
        pid = reward._process.popen.pid
        assert reward(completions=["pid"]) == [float(pid)]


def test_no_torch_and_pickling(file):
    with Isolated(f"{file}:modules") as reward:
        assert reward(completions=["a"]) == [0.0]
        with pickle.loads(pickle.dumps(reward)) as copy:
            assert copy._process.popen.pid != reward._process.popen.pid


@contextmanager
def interruptible():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_in_a_call_does_not_mix_up_answers(file):
    """The answer to the broken-off call must not be given to the next one."""
    # A shell lets what it starts in the background ignore Ctrl-C.
    with interruptible(), Isolated(f"{file}:hangs") as reward:
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            reward(completions=["hang"])
        assert reward(completions=["on", "on"]) == [1.0, 1.0]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a closed pipe is Linux")
def test_a_killed_parent_takes_a_hanging_child_along(file, tmp_path):
    pid_file = tmp_path / "pids"
    code = (
        "from reward_models.isolation import Isolated\n"
        f"Isolated({str(file) + ':hangs'!r}, {{'pid_file': {str(pid_file)!r}}})(completions=['hang'])"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 10
    while not (pid_file.exists() and len(pid_file.read_text().split()) == 2) and time.monotonic() < deadline:
        time.sleep(0.02)
    pids = [int(pid) for pid in pid_file.read_text().split()]
    assert all(map(running, pids))
    parent.kill()
    parent.wait()
    assert gone(pids)


def test_a_fork_that_returns_is_not_heard(file):
    """The copy would answer first, and the answers to all later calls would be one call late."""
    with Isolated(f"{file}:forks") as reward:
        assert [reward(completions=["a"] * n) for n in (1, 2, 3)] == [[1.0] * n for n in (1, 2, 3)]


def test_an_answer_to_an_earlier_call_is_refused(file):
    """The copy pretends to be the original, so that both answer the first call."""
    with Isolated(f"{file}:forks", {"hide": True}) as reward:
        assert reward(completions=["a"]) == [-1.0]
        time.sleep(0.5)
        with pytest.raises(RuntimeError, match="forks': its process answered an earlier call again, on rows"):
            reward(completions=["a", "b"])
        assert reward(completions=["a"]) == [-1.0], "the next call starts a fresh child"


class Here:
    """The child does not have this file's module."""


def test_a_column_that_the_child_cannot_read_is_no_answer_out_of_step(file):
    with Isolated(f"{file}:length") as reward:
        reward(completions=["a"])
        Here.__module__ = "nowhere"
        sys.modules["nowhere"] = sys.modules[__name__]
        try:
            with pytest.raises(RuntimeError, match="raised .*: ModuleNotFoundError: No module named 'nowhere'"):
                reward(completions=["a"], thing=[Here()])
        finally:
            del sys.modules["nowhere"]
        assert reward(completions=["abc"]) == [3.0]


def test_a_file_that_isolates_itself_makes_no_chain(tmp_path):
    path = tmp_path / "chain.py"
    source = "from reward_models.isolation import Isolated\nstarted = Isolated(__file__ + ':f')\ndef f(**_): pass\n"
    path.write_text(source)
    with pytest.raises(ValueError, match="a reward's child process cannot start another one"):
        Isolated(f"{path}:f", startup_timeout=20)


def test_the_first_line_of_an_error_says_what_and_where(file, tmp_path):
    """A caller may show one line only."""
    with Isolated(f"{file}:says_two_lines") as reward:
        with pytest.raises(RuntimeError) as caught:
            reward(completions=["a"])
    assert str(caught.value).splitlines()[0].endswith("says_two_lines' raised (row 0 of 1): ValueError: one two")
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    with pytest.raises(ValueError) as caught:
        Isolated(f"{tmp_path}/broken.py:f")
    assert "ModuleNotFoundError: No module named 'nothing_of_this_name'" in str(caught.value).splitlines()[0]
