"""ROUGE-L: hand-worked numbers, the textbook LCS, and pycocoevalcap on the same tokens."""

from __future__ import annotations

import numpy as np
import pytest

from reward_models.metrics.rouge import RougeL


def combine(p: float, r: float, beta: float = 1.2) -> float:
    return (1 + beta**2) * p * r / (r + beta**2 * p)


def lcs(a: list[str], b: list[str]) -> int:
    """The table of the textbook."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def one(candidate: str, references: list[str], **options) -> float:
    return float(RougeL(tokenizer="whitespace", **options).score([candidate], [references])[0])


def test_subsequence_may_have_gaps_but_keeps_its_order():
    assert one("a x b y c", ["a b c d"]) == pytest.approx(combine(3 / 5, 3 / 4), abs=1e-15)
    assert one("c b a", ["a b c"]) == pytest.approx(1 / 3, abs=1e-15)  # P = R = 1/3


def test_precision_and_recall_may_come_from_different_references():
    # against "a b c d e f": P = 3/3, R = 3/6; against "a b": P = 2/3, R = 2/2
    assert one("a b c", ["a b c d e f", "a b"]) == pytest.approx(1.0, abs=1e-15)


def test_beta_weighs_recall():
    assert one("a b", ["a b c d"], beta=3.0) == pytest.approx(combine(1.0, 0.5, 3.0), abs=1e-15)
    with pytest.raises(ValueError, match="beta"):
        RougeL(beta=0)


def test_nothing_in_common_and_nothing_at_all_score_zero():
    metric = RougeL()
    assert metric.score(["x y", "", "...", "a"], [["a b"], ["a"], ["a"], ["..."]]).tolist() == [0.0] * 4


def test_end_token_counts_only_with_eos_and_only_when_ended():
    refs = [["a b"]] * 2
    assert RougeL().score(["a b"] * 2, refs, ended=[True, False]).tolist() == [1.0, 1.0]
    ended, cut = RougeL(eos=True).score(["a b"] * 2, refs, ended=[True, False])
    assert ended == 1.0 and cut == pytest.approx(combine(1.0, 2 / 3))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
def test_longest_common_subsequence_for_all_lengths(length):
    # 64 words fit one machine word: one less, one more, and the carry out of the last bit
    rng = np.random.default_rng(length)
    metric = RougeL(tokenizer="whitespace")
    for letters in ("a", "ab", "abcdefgh"):
        refs = [list(rng.choice(list(letters), length)) for _ in range(3)] + [list(letters)]
        rows = [list(rng.choice(list(letters + "z"), n)) for n in (1, 17, 64, 90)] + [refs[0]]
        texts, columns = [" ".join(row) for row in rows], [[" ".join(ref) for ref in refs]] * len(rows)
        expected = []
        for row in rows:
            common = [lcs(row, ref) for ref in refs]
            p, r = max(common) / len(row), max(c / len(ref) for c, ref in zip(common, refs, strict=True))
            expected.append(combine(p, r) if p else 0.0)
        np.testing.assert_allclose(metric.score(texts, columns), expected, rtol=0, atol=1e-14)


def test_pycocoevalcap_agrees():
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdefghij"), rng.integers(1, 15))) for _ in range(200)]
    refs = [[" ".join(rng.choice(list("abcdefghij"), rng.integers(1, 15))) for _ in range(5)] for _ in range(200)]
    theirs = rouge.Rouge().compute_score(dict(enumerate(refs)), {i: [t] for i, t in enumerate(texts)})[1]
    np.testing.assert_allclose(RougeL(tokenizer="whitespace").score(texts, refs), theirs, rtol=0, atol=1e-12)


def test_signature_names_what_the_score_depends_on():
    assert RougeL().signature == "ROUGE-L|beta:1.2|refs:max-p-max-r|eos:no|tok:simple|version:1"
    different = [RougeL(beta=2.0), RougeL(eos=True), RougeL(tokenizer="whitespace"), RougeL()]
    assert len({metric.signature for metric in different}) == 4
