"""The numbers of `mmft evaluate` are those of the official pipeline, with its own tokenizer, on the same files."""

import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from mmft.data import load_rows

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from evaluate_parity import METRICS, ODD, official, ours, write_files

needs_java = pytest.mark.skipif(
    shutil.which("java") is None or importlib.util.find_spec("pycocoevalcap") is None,
    reason="the official pipeline needs Java and pycocoevalcap",
)


@needs_java
def test_every_metric_of_the_official_pipeline(tmp_path):
    """Among the captions: some that are a reference word for word (METEOR counts those in a way of its own when it sums
    up), and odd ones: quotes, brackets, accents, other scripts."""
    corpus = load_rows("scenes", "test", limit=30).references()
    for k, text in enumerate(ODD):
        corpus[k] = [text, *corpus[k][1:], 'a dog isn\'t running (in red), "here"']
    for k in (12, 13, 14):
        corpus[k][0] = corpus[k][2]
    files = write_files(tmp_path, corpus)
    theirs, found = official(*files), ours(*files, list(METRICS))
    names = {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr"}
    assert names <= theirs.keys() and names == found.keys()
    for name in names:
        assert found[name][0] == pytest.approx(theirs[name][0], abs=1e-9), name
        assert np.allclose(found[name][1], theirs[name][1], rtol=0, atol=1e-9), name
