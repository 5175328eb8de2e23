"""METEOR and SPICE: the Java child itself where there is one, and a stand-in that misbehaves on request."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from reward_models.metrics import java
from reward_models.metrics.java import Meteor, Spice

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no Java here")
needs_jars = pytest.mark.skipif(importlib.util.find_spec("pycocoevalcap") is None, reason="no pycocoevalcap here")

# Speaks METEOR's protocol: a row's score is the number of words that candidate and references share, over 100.
FAKE_METEOR = """
    import sys, time
    sys.stderr.write("noise " * 100_000 + "\\n")
    sys.stderr.flush()
    for line in sys.stdin:
        verb, *parts = [part.strip() for part in line.split("|||")]
        if "dies" in line.split():
            sys.exit("java.lang.OutOfMemoryError: no room")
        if "hangs" in line.split():
            time.sleep(60)
        if verb == "SCORE":
            *references, candidate = [set(part.split()) for part in parts]
            print(len(candidate & set.union(*references)))
        else:
            for part in parts:
                print(float(part) / 100)
            print(sum(map(float, parts)) / 100)
        sys.stdout.flush()
"""
FAKE_SPICE = """
    import json, os, sys
    if "--add-opens=java.base/java.lang=ALL-UNNAMED" not in os.environ["JDK_JAVA_OPTIONS"]:
        sys.exit("java.lang.reflect.InaccessibleObjectException")
    rows = json.load(open(sys.argv[sys.argv.index("spice-1.0.jar") + 1]))
    if any(row["test"] == "fails" for row in rows):
        sys.exit("Exception in thread main: parser fell over\\n\\tat Spice.java:1")
    def score(row):
        return None if row["test"] == "nothing" else len(row["test"]) / 100 + len(row["refs"]) / 10
    answer = [{"image_id": row["image_id"], "scores": {"All": {"f": score(row)}}} for row in reversed(rows)]
    json.dump(answer, open(sys.argv[sys.argv.index("-out") + 1], "w"))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Path of a `java` that runs the given program, beside a pycocoevalcap whose jars are empty files."""

    def make(program):
        for file in ("meteor/meteor-1.5.jar", "meteor/data/paraphrase-en.gz", "spice/spice-1.0.jar") + tuple(
            f"spice/lib/stanford-corenlp-3.6.0{end}.jar" for end in ("", "-models")
        ):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).touch()
        spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
        monkeypatch.setattr(java.importlib.util, "find_spec", lambda name: spec)
        script = tmp_path / "java"
        script.write_text(f"#!{sys.executable}\n{textwrap.dedent(program)}")
        script.chmod(0o755)
        return str(script)

    return make


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


HOSTILE = [
    "a dog\nruns on grass",
    "a dog\truns on grass",
    "a dog ||| runs on grass",
    "a dog \x00 runs\x85on grass",
    "a dog 🐕 runs on grass",
    "a\u2028dog\r\nruns",
    "",
    " \n ",
    "|||",
    "...",
    "\ud800 a dog",
    "EVAL ||| 1 2 3",
    "a dog runs on grass",
]
REFERENCES = ["a dog is running on the grass", "a brown dog runs", "", "a ||| b\nc"]


@needs_java
@needs_jars
def test_meteor_itself():
    with Meteor(tokenizer="whitespace") as meteor:
        # what pycocoevalcap 1.2 gives for these rows
        texts = ["a dog runs on grass", "men playing soccer", "a red bus"]
        refs = [["a dog is running on the grass", "a brown dog runs"], ["two men play football"], ["a cat"]]
        assert meteor.score(texts, refs) == pytest.approx(
            [0.3153424341215394, 0.34732420461213054, 0.0898876404494382], abs=1e-12
        )
        assert meteor.corpus(texts, refs) == pytest.approx(0.2828538412118409, abs=1e-12)

        batch = meteor.score(HOSTILE, [REFERENCES] * len(HOSTILE))
        alone = [float(meteor.score([text], [REFERENCES])[0]) for text in HOSTILE]
        assert batch.tolist() == alone
        plain = alone[-1]
        assert plain > 0.3 and alone[0] == alone[1] == alone[2] == alone[3] == plain  # separators cost nothing
        assert alone[6] == alone[7] == alone[8] == 0
        assert 0 < meteor.corpus(["a dog", ""], [["a dog"], ["a cat"]]) < meteor.corpus(["a dog"], [["a dog"]]) == 1


def test_a_line_never_holds_a_separator():
    for text in (*HOSTILE, "||||", "| || |||||", "a|||||||b"):
        line = java._line(str.split, text)
        assert "|||" not in line and not any(ord(c) < 32 or c in "\x7f\x85\u2028\u2029" for c in line)
    assert java._line(str.split, "a\n b\x00c") == "a b c"


def test_rows_stay_aligned_and_noise_on_stderr_stops_nothing(fake):
    meteor = Meteor(tokenizer="whitespace", java=fake(FAKE_METEOR), timeout=30)
    texts = ["a dog", "", "a dog ||| runs", "dog\ncat", "fish"]
    refs = [["a dog runs", ""]] * 4 + [[" "]]
    assert meteor.score(texts, refs) == pytest.approx([0.02, 0, 0.03, 0.01, 0])
    assert meteor(completions=texts, references=refs, other=1) == pytest.approx([0.02, 0, 0.03, 0.01, 0])
    meteor.close()


def test_a_child_that_hangs_or_dies_is_named_and_replaced(fake):
    meteor = Meteor(tokenizer="whitespace", java=fake(FAKE_METEOR), timeout=2)
    good, refs = ["a dog", "a cat"], [["a dog"]] * 2
    expected = meteor.score(good, refs).tolist()
    first = meteor._child._process.pid
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="meteor: row 1: Java gave no answer within 2 s"):
        meteor.score(["a dog", "hangs"], refs)
    assert time.monotonic() - start < 20 and not alive(first)
    assert meteor.score(good, refs).tolist() == expected
    with pytest.raises(OSError, match="row 0: Java ended .*OutOfMemoryError: no room"):
        meteor.score(["dies", "a dog"], refs)
    assert meteor.score(good, refs).tolist() == expected
    meteor.close()


def test_an_answer_left_unread_does_not_shift_later_rows(fake, monkeypatch):
    meteor = Meteor(tokenizer="whitespace", java=fake(FAKE_METEOR), timeout=30)
    refs = [["a dog runs"]]
    expected = meteor.score(["a dog"], refs).tolist()
    with monkeypatch.context() as patch:
        patch.setattr(java.Meteor, "_evaluate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            meteor.score(["a dog runs"], refs)
    assert meteor.score(["a dog"], refs).tolist() == expected
    meteor.close()


def test_the_child_ends_with_its_owner(fake):
    program = fake(FAKE_METEOR)
    meteor = Meteor(tokenizer="whitespace", java=program, timeout=30)
    meteor.score(["a"], [["a"]])
    copy = pickle.loads(pickle.dumps(meteor))
    assert copy.signature == meteor.signature and copy.score(["a"], [["a"]])[0] == 0.01
    pids = [meteor._child._process.pid, copy._child._process.pid]
    assert len(set(pids)) == 2 and all(map(alive, pids))
    copy.close()
    assert not alive(pids[1])
    child = os.fork()
    if not child:  # a fork must leave its parent's process alone
        meteor.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert alive(pids[0]) and meteor.score(["a"], [["a"]])[0] == 0.01
    del meteor
    gc.collect()
    assert not alive(pids[0])

    code = (
        "import sys; from types import SimpleNamespace as S; from reward_models.metrics import java\n"
        f"java.importlib.util.find_spec = lambda name: S(submodule_search_locations=[{str(Path(program).parent)!r}])\n"
        f"m = java.Meteor(tokenizer='whitespace', java={program!r}); m.score(['a'], [['a']])\n"
        "print(m._child._process.pid)"
    )
    root = Path(java.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not alive(int(done.stdout))


def test_spice_rows(fake):
    spice = Spice(tokenizer="whitespace", java=fake(FAKE_SPICE), timeout=30)
    texts = ["a\ndog", "", "nothing", "fish", "a dog", "x"]
    refs = [["r"], ["r"], ["r"], ["r", "s", ""], ["r"], ["", "\n"]]
    expected = [0.15, 0, 0, 0.24, 0.15, 0]  # 5 letters and 1 reference, no words, no tuples, 4 letters and 2, ...
    assert spice.score(texts, refs) == pytest.approx(expected)
    assert spice(completions=texts, references=refs) == pytest.approx(expected)
    assert np.array_equal(spice.score(["", " "], [["r"], ["r"]]), np.zeros(2))
    with pytest.raises(OSError, match="Java gave no scores .exit code 1.: Exception in thread main: parser fell over"):
        spice.score(["a", "fails"], [["r"], ["r"]])
    assert "tok:whitespace" in spice.signature and spice.__name__ == "spice"


def test_spice_has_a_time_limit(fake):
    spice = Spice(tokenizer="whitespace", java=fake("import time; time.sleep(60)"), timeout=0.5)
    with pytest.raises(TimeoutError, match="spice: Java did not finish 1 rows within 0.5 s"):
        spice.score(["a"], [["r"]])


def test_what_is_missing_is_said_plainly(fake, tmp_path, monkeypatch):
    program = fake("")
    for kind in (Meteor, Spice):
        with pytest.raises(ValueError, match="needs Java and there is no 'no-such-java' on the PATH; install"):
            kind(tokenizer="simple", java="no-such-java")
    (tmp_path / "spice/lib/stanford-corenlp-3.6.0-models.jar").unlink()
    with pytest.raises(ValueError, match="CoreNLP 3.6.0 jars.*python -m pycocoevalcap.spice.get_stanford_models"):
        Spice(tokenizer="simple", java=program)
    (tmp_path / "meteor/meteor-1.5.jar").unlink()
    with pytest.raises(ValueError, match="meteor-1.5.jar is missing; reinstall pycocoevalcap"):
        Meteor(tokenizer="simple", java=program)
    monkeypatch.setattr(java.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the jars of pycocoevalcap: pip install pycocoevalcap"):
        Meteor(tokenizer="simple", java=program)
    with pytest.raises(ValueError, match="meteor: memory must look like '2G'"):
        Meteor(tokenizer="simple", memory="2 gigs")


def test_rows_are_checked_before_java_is_asked(fake):
    meteor = Meteor(tokenizer="whitespace", java=fake(FAKE_METEOR))
    with pytest.raises(ValueError, match=r"meteor: row 1 .id 'b'. has no references"):
        meteor(completions=["a", "b"], references=[["a"], []], id=["a", "b"])
    assert meteor._child is None and json.dumps(meteor.score([], []).tolist()) == "[]"
