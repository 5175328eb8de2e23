"""Score a COCO results file against a COCO caption file, as the official server does; Java only for METEOR and SPICE.

References: {"images": [{"id": ...}], "annotations": [{"image_id": ..., "caption": "..."}]} ("images" is optional).
Results: [{"image_id": ..., "caption": "..."}], one entry per picture.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from reward_models.metrics.bleu import Bleu
from reward_models.metrics.cider import Cider, CiderD
from reward_models.metrics.java import Meteor, Spice
from reward_models.metrics.ngrams import DocumentFrequencies
from reward_models.metrics.rouge import RougeL

METRICS = ("cider_d", "bleu", "rouge_l", "cider", "meteor", "spice")
DEFAULT_METRICS = METRICS[:3]


class MetricScores(NamedTuple):
    """means: what is reported of the whole, by name; rows: name -> (N,) float64; signature: what they depend on."""

    means: dict[str, float]
    rows: dict[str, np.ndarray]
    signature: str


def _read_json(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None


def _caption(path: str, where: str, entry: Any) -> tuple[Any, str]:
    if not isinstance(entry, dict) or "image_id" not in entry or "caption" not in entry:
        raise ValueError(f"{path}: {where}: expected an object with 'image_id' and 'caption', got {str(entry)[:80]}")
    image_id, caption = entry["image_id"], entry["caption"]
    if isinstance(image_id, bool) or not isinstance(image_id, (int, str)):
        raise ValueError(f"{path}: {where}: image_id must be a number or a string, got {image_id!r}")
    if not isinstance(caption, str):
        raise ValueError(f"{path}: {where} (image_id {image_id!r}): caption must be a string, got {caption!r}")
    return image_id, caption


def read_references(path: str) -> dict[Any, list[str]]:
    """Picture id -> its reference captions, in the order of the file. ValueError naming file and entry."""
    data = _read_json(path)
    if not isinstance(data, dict) or not isinstance(data.get("annotations"), list):
        raise ValueError(f'{path}: expected COCO captions: an object with a list "annotations"')
    out: dict[Any, list[str]] = {}
    for i, entry in enumerate(data["annotations"]):
        image_id, caption = _caption(path, f"annotations[{i}]", entry)
        out.setdefault(image_id, []).append(caption)
    if not out:
        raise ValueError(f'{path}: "annotations" is empty')
    images = data.get("images") or []
    if not isinstance(images, list):
        raise ValueError(f'{path}: "images" is no list, got {str(images)[:80]}')
    listed = [image.get("id") for image in images if isinstance(image, dict)]
    if odd := [name for name in listed if isinstance(name, list | dict)]:
        raise ValueError(f'{path}: "images": id must be a number or a string, got {odd[0]!r}')
    bare = [image_id for image_id in listed if image_id not in out]
    if bare:
        raise ValueError(f'{path}: {len(bare)} entries of "images" have no caption, first ids: {_some(bare)}')
    if listed and (stray := [image_id for image_id in out if image_id not in set(listed)]):
        raise ValueError(f'{path}: {len(stray)} captioned ids are not in "images", first: {_some(stray)}')
    return out


def read_results(path: str, references: dict[Any, list[str]], allow_missing: bool = False) -> dict[Any, str]:
    """Picture id -> caption, exactly one for every picture of `references`. ValueError naming what is amiss.

    allow_missing: pictures without a result are no error.
    """
    data = _read_json(path)
    if not isinstance(data, list):
        raise ValueError(f'{path}: expected COCO results: a list of {{"image_id", "caption"}}')
    pairs = [_caption(path, f"entry {i}", entry) for i, entry in enumerate(data)]
    twice = [image_id for image_id, times in Counter(image_id for image_id, _ in pairs).items() if times > 1]
    if twice:
        raise ValueError(f"{path}: {len(twice)} image ids occur more than once, first: {_some(twice)}")
    out = dict(pairs)
    unknown = [image_id for image_id in out if image_id not in references]
    if unknown:
        raise ValueError(f"{path}: {len(unknown)} image ids are not in the references, first: {_some(unknown)}")
    missing = [image_id for image_id in references if image_id not in out]
    if missing and not allow_missing:
        raise ValueError(
            f"{path}: {len(missing)} of {len(references)} pictures have no result, first: {_some(missing)}"
        )
    return out


def _some(ids: Sequence[Any]) -> str:
    return ", ".join(map(repr, ids[:5])) + (", ..." if len(ids) > 5 else "")


def check_metrics(metrics: Sequence[str]) -> None:
    """ValueError for a metric that does not exist, listing those that do."""
    for metric in metrics:
        if metric not in METRICS:
            near = difflib.get_close_matches(metric, METRICS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown metric {metric!r}; {hint}There are: {', '.join(METRICS)}")


def _tokenizer(df: DocumentFrequencies | None, tokenizer: str | None) -> str:
    if df is not None and tokenizer not in (None, df.tokenizer):
        raise ValueError(f"the document frequencies were counted with tokenizer {df.tokenizer!r}, not {tokenizer!r}")
    return df.tokenizer if df is not None else tokenizer or "simple"


def score_rows(
    metric: str,
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    df: DocumentFrequencies | None = None,
    tokenizer: str | None = None,
    **options: Any,
) -> MetricScores:
    """N candidates against their references with one metric, the way the COCO server does by default.

    That is: no end token (eos=False), document frequencies counted over `references` (one document per row) unless
    `df` is given, and BLEU without smoothing. The means of `bleu` and `meteor` are scores of the whole corpus. The
    tokenizer is that of `df`, or `simple`. Further options are those of the metric's class. ValueError for a wrong one.
    """
    check_metrics([metric])
    tokenizer = _tokenizer(df, tokenizer)
    try:
        if metric in ("cider_d", "cider"):
            if df is None and len(references) < 2:
                raise ValueError("only one row: the frequencies of a corpus are needed (a saved file, or more rows)")
            df = df or DocumentFrequencies.from_references(references, tokenizer=tokenizer)
            kind = CiderD if metric == "cider_d" else Cider
            return _plain(metric, kind(df, **{"eos": False, **options}), candidates, references)
        if metric == "bleu":
            return _bleu(Bleu(**{"smooth": False, "tokenizer": tokenizer, **options}), candidates, references)
        if metric == "rouge_l":
            return _plain(metric, RougeL(tokenizer=tokenizer, **options), candidates, references)
        if metric == "spice":
            return _plain(metric, Spice(tokenizer=tokenizer, **options), candidates, references)
        with Meteor(tokenizer=tokenizer, **options) as meteor:
            rows = {metric: meteor.score(candidates, references)}
            return MetricScores({metric: meteor.corpus(candidates, references)}, rows, meteor.signature)
    except TypeError as error:  # an option that the class does not have
        raise ValueError(f"{metric}: {error}") from error
    except ValueError as error:
        if str(error).startswith(metric):
            raise
        raise ValueError(f"{metric}: {error}") from error


def _plain(metric: str, scorer: Any, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> MetricScores:
    values = scorer.score(candidates, references)
    return MetricScores({metric: float(values.mean()) if len(values) else 0.0}, {metric: values}, scorer.signature)


def _bleu(bleu: Bleu, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> MetricScores:
    orders, corpus = bleu.orders(candidates, references), bleu.corpus(candidates, references)
    names = [f"bleu_{n}" for n in range(1, bleu.n + 1)]
    means = dict(zip(names, corpus.tolist(), strict=True))
    return MetricScores(means, dict(zip(names, orders.T, strict=True)), bleu.signature)


def score_files(
    references_path: str,
    results_path: str,
    metrics: Sequence[str] = DEFAULT_METRICS,
    df_path: str | None = None,
    tokenizer: str | None = None,
) -> dict[str, Any]:
    """Scores of a results file: {"means", "images": {id: {...}}, "signatures", "pictures"}; see `score_rows`."""
    check_metrics(metrics)
    references = read_references(references_path)
    results = read_results(results_path, references)
    ids = list(references)
    candidates, refs = [results[i] for i in ids], [references[i] for i in ids]
    images: dict[str, dict[str, float]] = {str(i): {} for i in ids}
    if len(images) != len(ids):
        raise ValueError(f"{references_path}: image ids that differ only in type (1 and '1') cannot be told apart")
    df = DocumentFrequencies.load(df_path) if df_path else None
    if df is None and len(refs) < 2 and {"cider_d", "cider"} & set(metrics):
        raise ValueError(f"{references_path}: only one picture; CIDEr needs frequencies of a corpus: give --df FILE")
    means: dict[str, float] = {}
    signatures: dict[str, str] = {}
    for metric in metrics:
        scores = score_rows(metric, candidates, refs, df=df, tokenizer=tokenizer)
        means |= scores.means
        signatures[metric] = scores.signature
        for name, values in scores.rows.items():
            for i, value in zip(ids, values.tolist(), strict=True):
                images[str(i)][name] = value
    return {"means": means, "images": images, "signatures": signatures, "pictures": len(ids)}
