"""METEOR and SPICE, which exist only as Java programs: the jars that pycocoevalcap brings, run with care.

Java reads one line per row, so a line feed or `|||` in a caption would shift all rows after it, and METEOR takes the
last reference for an empty candidate. Here text is tokenised and cleaned first, a row without words scores 0 without
asking Java, every answer is waited for with a time limit, and the child process ends with its owner. A score never
depends on its batch-mates.

Needs a Java runtime and `pip install pycocoevalcap`; ValueError says which of the two is missing. SPICE also needs the
Stanford CoreNLP 3.6.0 jars (half a gigabyte), which pycocoevalcap does not bring. They are never downloaded from here:
a reward that starts to download in the middle of a training run, once per rank, is worse than one that says what to do.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from reward_models.metrics.text import check_rows, tokenizer_named

_VERSION = 1
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
# SPICE's serialiser reads private fields of these packages, which Java forbids since version 16. The variable is read
# by `java` itself from version 9 on and ignored by older ones, unlike the same flags on the command line.
_OPEN = " ".join(
    f"--add-opens={package}=ALL-UNNAMED"
    for package in (
        "java.base/java.lang",
        "java.base/java.math",
        "java.base/java.net",
        "java.base/java.text",
        "java.base/java.util",
        "java.base/java.util.concurrent",
        "java.sql/java.sql",
    )
)


def _find_java(name: str, java: str) -> str:
    found = shutil.which(java)
    if found is None:
        raise ValueError(
            f"{name} needs Java and there is no {java!r} on the PATH; install a Java runtime (Debian, Ubuntu: apt "
            f"install default-jre-headless), or leave {name} out"
        )
    return found


def _find_folder(name: str, files: Sequence[str]) -> Path:
    """The folder of pycocoevalcap that holds the jar; ValueError if it, or one of the files in it, is missing."""
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{name} needs the jars of pycocoevalcap: pip install pycocoevalcap, or leave {name} out")
    folder = Path(spec.submodule_search_locations[0]) / name
    missing = [file for file in files if not (folder / file).is_file()]
    if missing and all(file.startswith("lib/stanford-corenlp") for file in missing):
        raise ValueError(
            f"{name} needs the Stanford CoreNLP 3.6.0 jars, and {folder / missing[0]} is missing. With a network, "
            "`python -m pycocoevalcap.spice.get_stanford_models` fetches them once (about 0.5 GB); or leave spice out"
        )
    if missing:
        raise ValueError(f"{name}: {folder / missing[0]} is missing; reinstall pycocoevalcap, or leave {name} out")
    return folder


def _check_options(name: str, timeout: float, memory: str) -> None:
    if not timeout > 0:
        raise ValueError(f"{name}: timeout must be above 0 seconds, got {timeout!r}")
    if not re.fullmatch(r"[1-9]\d*[KMGkmg]", memory):
        raise ValueError(f"{name}: memory must look like '2G' or '500M', got {memory!r}")


def _line(tokenize: Callable[[str], list[str]], text: str) -> str:
    """The tokens of a text as one line that holds no separator of METEOR and no control character."""
    return " ".join(_CONTROL.sub(" ", " ".join(tokenize(text))).replace("|||", " ").split())


def _lines(
    tokenize: Callable[[str], list[str]], texts: Sequence[str], references: Sequence[tuple[str, ...]]
) -> list[tuple[str, tuple[str, ...]]]:
    """Per row the candidate's line and those of its references that hold a word; without either, a row scores 0."""
    sets = {refs: tuple(filter(None, (_line(tokenize, ref) for ref in refs))) for refs in dict.fromkeys(references)}
    return [(_line(tokenize, text), sets[refs]) for text, refs in zip(texts, references, strict=True)]


def _last_words(errors: Any) -> str:
    """The line of a Java child's stderr that says what went wrong."""
    errors.seek(0)
    lines = errors.read().decode("utf-8", "replace").splitlines()
    lines = [line.strip() for line in lines if line.strip() and not line.startswith("NOTE: Picked up")]
    telling = [line for line in lines if "Exception" in line or "Error" in line]
    return (telling or lines or ["it said nothing"])[0][:300]


class _Child:
    """A Java process that answers lines with lines, in turn. Ends when it is closed, collected, or at exit."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, timeout: float) -> None:
        self._name, self._timeout = name, timeout
        self._errors = tempfile.TemporaryFile()  # a pipe that nobody reads would stop Java once it is full
        self._process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )
        self.owner = os.getpid()
        self.end = weakref.finalize(self, _Child._end, self._process, self._errors, self.owner)

    @staticmethod
    def _end(process: subprocess.Popen[bytes], errors: Any, owner: int) -> None:
        if os.getpid() != owner:
            return  # a fork inherits this object, but the process belongs to the parent
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, errors):
            with suppress(OSError):  # what was still to be written has no reader left
                stream.close()  # type: ignore[union-attr]

    def ask(self, line: str, answers: int, row: int) -> list[bytes]:
        """Send one line, return that many; TimeoutError, or OSError with Java's own words if it has died."""
        assert self._process.stdin and self._process.stdout
        late = threading.Event()

        def stop() -> None:  # Java's death also ends a write or read that hangs
            late.set()
            self._process.kill()

        timer = threading.Timer(self._timeout, stop)
        timer.daemon = True
        timer.start()
        try:
            self._process.stdin.write(line.encode("utf-8", "replace") + b"\n")
            self._process.stdin.flush()
            got = [self._process.stdout.readline() for _ in range(answers)]
        except BrokenPipeError:
            got = [b""]
        finally:
            timer.cancel()
            timer.join()  # it holds on to this child, which could not end with its owner before the thread has
        if late.is_set():
            raise TimeoutError(f"{self._name}: row {row}: Java gave no answer within {self._timeout:g} s")
        if not all(got):
            with suppress(subprocess.TimeoutExpired):  # its output has ended, so it is about to
                self._process.wait(5)
            code = self._process.poll()
            raise OSError(f"{self._name}: row {row}: Java ended (exit code {code}): {_last_words(self._errors)}")
        return got


class Meteor:
    """METEOR 1.5 (Denkowski and Lavie 2014) as a reward: `Meteor()(completions=..., references=...) -> list[float]`.

    Scores lie in [0, 1]. tokenizer: see `reward_models.metrics.text`; `ptb` is what the COCO server uses. timeout:
    seconds for one row; the first row also waits for Java to load its tables (about 7 s). memory: Java's heap. The
    Java process starts with the first row, is kept for the next call, and is started anew after an error and in a
    forked or unpickled copy. ValueError where Java or pycocoevalcap is missing.
    """

    __name__ = "meteor"

    def __init__(
        self, *, tokenizer: str = "ptb", timeout: float = 120.0, memory: str = "2G", java: str = "java"
    ) -> None:
        _check_options("meteor", timeout, memory)
        self.tokenizer, self.timeout, self.memory, self.java = tokenizer, timeout, memory, java
        self._tokenize = tokenizer_named(tokenizer)
        self._folder = _find_folder("meteor", ("meteor-1.5.jar", "data/paraphrase-en.gz"))
        # without an encoding, Java reads the text in whatever the locale says
        self._command = [_find_java("meteor", java), "-Dfile.encoding=UTF-8", f"-Xmx{memory}"]
        self._command += ["-jar", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
        self._child: _Child | None = None
        self._lock = threading.Lock()

    @property
    def signature(self) -> str:
        """Everything a score depends on, in one line: scores with equal signatures can be compared."""
        return f"METEOR|jar:1.5|lang:en|norm:yes|tok:{self.tokenizer}|version:{_VERSION}"

    def __call__(
        self,
        prompts: Any = None,
        completions: Sequence[Any] = (),
        references: Sequence[Sequence[str]] | None = None,
        ended: Sequence[bool] | None = None,
        **columns: Any,
    ) -> list[float]:
        texts, refs, _ = check_rows("meteor", completions, references, ended, columns.get("id"))
        return self._scores(texts, refs).tolist()

    def score(
        self,
        candidates: Sequence[str],
        references: Sequence[Sequence[str]],
        ended: Sequence[bool] | None = None,
    ) -> np.ndarray:
        """Scores (N,) float64; 0 for a candidate without words. TimeoutError or OSError if Java hangs or dies."""
        texts, refs, _ = check_rows("meteor", candidates, references, ended)
        return self._scores(texts, refs)

    def corpus(self, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """The score of the whole, from summed counts: what the COCO server reports, not the mean of the rows."""
        counts = [row for row in self._rows(candidates, references) if row]
        with self._lock, self._closed_on_error():
            return self._evaluate(0, counts)[-1] if counts else 0.0

    def counts(self, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """(N, 23) float64: METEOR's sufficient statistics, whose sums over rows are those of a set of rows.

        Of candidate and reference in turn: words, function words, and per stage (exact, stem, synonym, paraphrase)
        matched content words and matched function words; then chunks, and matched words of either side.
        """
        rows = self._rows(candidates, references)
        return np.array([list(map(float, row.split())) if row else [0.0] * 23 for row in rows]).reshape(-1, 23)

    def _rows(self, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[str]:
        """Per row its statistics as METEOR writes them; nothing where no reference has a word."""
        texts, refs, _ = check_rows("meteor", candidates, references)
        out = []
        with self._lock, self._closed_on_error():
            for i, (text, lines) in enumerate(_lines(self._tokenize, texts, refs)):
                if text and lines:
                    out.append(self._counts(i, text, lines))
                elif lines:  # METEOR cannot read an empty candidate: count a word that nobody says, as no word
                    unheard = "z" * (1 + max(map(len, lines)))
                    out.append(" ".join(["0.0", *self._counts(i, unheard, lines).split()[1:]]))
                else:
                    out.append("")
        return out

    def close(self) -> None:
        """End the Java process; the next call starts one again."""
        child, self._child = self._child, None
        if child is not None:
            child.end()

    def __enter__(self) -> Meteor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.tokenizer, self.timeout, self.memory, self.java)

    def _scores(self, texts: list[str], references: list[tuple[str, ...]]) -> np.ndarray:
        out = np.zeros(len(texts))
        with self._lock, self._closed_on_error():
            for i, (text, lines) in enumerate(_lines(self._tokenize, texts, references)):
                if text and lines:
                    out[i] = self._evaluate(i, [self._counts(i, text, lines)])[0]
        return out

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        """After any error, an interrupt too, Java must go: an answer left unread would be taken for the next row's."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _counts(self, row: int, candidate: str, references: tuple[str, ...]) -> str:
        """METEOR's sufficient statistics of one row, as it writes them."""
        if self._child is None or self._child.owner != os.getpid():
            self._child = _Child("meteor", self._command, self._folder, self.timeout)
        return self._child.ask(" ||| ".join(("SCORE", *references, candidate)), 1, row)[0].decode().strip()

    def _evaluate(self, row: int, counts: list[str]) -> list[float]:
        """The score of each row's counts and, last, of their sum."""
        assert self._child is not None
        scores = map(float, self._child.ask(" ||| ".join(["EVAL", *counts]), len(counts) + 1, row))
        return [score if math.isfinite(score) else 0.0 for score in scores]


class Spice:
    """SPICE 1.0 (Anderson et al. 2016, arXiv 1607.08822): F1 of scene-graph tuples, `Spice()(...) -> list[float]`.

    Scores lie in [0, 1]; a row in which neither side yields a tuple scores 0. tokenizer: see
    `reward_models.metrics.text`; `ptb` is what the COCO server uses. Each call is one Java run that loads its parser
    first, so call it with many rows; timeout: seconds for the whole run. memory: Java's heap. SPICE's disk cache is
    not used: it lies among the installed files and has failed for many. ValueError where Java, pycocoevalcap or
    CoreNLP is missing.
    """

    __name__ = "spice"

    def __init__(
        self, *, tokenizer: str = "ptb", timeout: float = 1800.0, memory: str = "8G", java: str = "java"
    ) -> None:
        _check_options("spice", timeout, memory)
        self.tokenizer, self.timeout, self.memory, self.java = tokenizer, timeout, memory, java
        self._tokenize = tokenizer_named(tokenizer)
        corenlp = [f"lib/stanford-corenlp-3.6.0{end}.jar" for end in ("", "-models")]
        self._folder = _find_folder("spice", ("spice-1.0.jar", *corenlp))
        self._command = [_find_java("spice", java), "-Dfile.encoding=UTF-8", f"-Xmx{memory}", "-jar", "spice-1.0.jar"]

    @property
    def signature(self) -> str:
        """Everything a score depends on, in one line: scores with equal signatures can be compared."""
        return f"SPICE|jar:1.0|corenlp:3.6.0|tok:{self.tokenizer}|version:{_VERSION}"

    def __call__(
        self,
        prompts: Any = None,
        completions: Sequence[Any] = (),
        references: Sequence[Sequence[str]] | None = None,
        ended: Sequence[bool] | None = None,
        **columns: Any,
    ) -> list[float]:
        texts, refs, _ = check_rows("spice", completions, references, ended, columns.get("id"))
        return self._scores(texts, refs).tolist()

    def score(
        self,
        candidates: Sequence[str],
        references: Sequence[Sequence[str]],
        ended: Sequence[bool] | None = None,
    ) -> np.ndarray:
        """Scores (N,) float64; 0 for a candidate without words. TimeoutError or OSError if Java hangs or fails."""
        texts, refs, _ = check_rows("spice", candidates, references, ended)
        return self._scores(texts, refs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.tokenizer, self.timeout, self.memory, self.java)

    def _scores(self, texts: list[str], references: list[tuple[str, ...]]) -> np.ndarray:
        rows = _lines(self._tokenize, texts, references)
        asked = list(dict.fromkeys(row for row in rows if all(row)))
        known = dict(zip(asked, self._run(asked), strict=True)) if asked else {}
        return np.array([known.get(row, 0.0) for row in rows])

    def _run(self, rows: list[tuple[str, tuple[str, ...]]]) -> list[float]:
        data = [{"image_id": i, "test": text, "refs": refs} for i, (text, refs) in enumerate(rows)]
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as errors:
            asked, answered = Path(folder, "asked.json"), Path(folder, "answered.json")
            asked.write_text(json.dumps(data), encoding="utf-8")
            command = [*self._command, str(asked), "-out", str(answered), "-silent"]
            environment = os.environ | {"JDK_JAVA_OPTIONS": f"{os.environ.get('JDK_JAVA_OPTIONS', '')} {_OPEN}"}
            try:
                done = subprocess.run(
                    command,
                    cwd=self._folder,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    timeout=self.timeout,
                )
            except subprocess.TimeoutExpired:
                raise TimeoutError(f"spice: Java did not finish {len(rows)} rows within {self.timeout:g} s") from None
            try:
                found = {
                    entry["image_id"]: entry["scores"]["All"]["f"]
                    for entry in json.loads(answered.read_text(encoding="utf-8"))
                }
                values = [found[i] for i in range(len(rows))]
            except (OSError, ValueError, KeyError, TypeError):
                raise OSError(
                    f"spice: Java gave no scores (exit code {done.returncode}): {_last_words(errors)}"
                ) from None
        # neither side has a tuple: F1 is 0/0, which Java writes as null or "NaN"
        return [float(v) if isinstance(v, (int, float)) and math.isfinite(v) else 0.0 for v in values]


def _rebuild(kind: type, tokenizer: str, timeout: float, memory: str, java: str) -> Any:
    return kind(tokenizer=tokenizer, timeout=timeout, memory=memory, java=java)
