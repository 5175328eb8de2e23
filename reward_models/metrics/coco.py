"""Score a COCO results file against a COCO caption file, as the official server does but without Java.

References: {"images": [{"id": ...}], "annotations": [{"image_id": ..., "caption": "..."}]} ("images" is optional).
Results: [{"image_id": ..., "caption": "..."}], one entry per picture.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reward_models.metrics.bleu import Bleu
from reward_models.metrics.cider import CiderD
from reward_models.metrics.ngrams import DocumentFrequencies

METRICS = ("cider_d", "bleu")


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
    listed = [image.get("id") for image in data.get("images") or [] if isinstance(image, dict)]
    bare = [image_id for image_id in listed if image_id not in out]
    if bare:
        raise ValueError(f'{path}: {len(bare)} entries of "images" have no caption, first ids: {_some(bare)}')
    if listed and (stray := [image_id for image_id in out if image_id not in set(listed)]):
        raise ValueError(f'{path}: {len(stray)} captioned ids are not in "images", first: {_some(stray)}')
    return out


def read_results(path: str, references: dict[Any, list[str]]) -> dict[Any, str]:
    """Picture id -> caption, exactly one for every picture of `references`. ValueError naming what is amiss."""
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
    if missing:
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


def score_files(
    references_path: str, results_path: str, metrics: Sequence[str] = METRICS, df_path: str | None = None
) -> dict[str, Any]:
    """Scores of a results file: {"means", "images": {id: {...}}, "signatures", "pictures"}.

    cider_d and cider_d's document frequencies follow the official server: no end token, and counted over the reference
    file unless `df_path` names a saved file. Means of BLEU are corpus BLEU; per picture, unsmoothed sentence BLEU.
    """
    check_metrics(metrics)
    references = read_references(references_path)
    results = read_results(results_path, references)
    ids = list(references)
    candidates, refs = [results[i] for i in ids], [references[i] for i in ids]
    images: dict[str, dict[str, float]] = {str(i): {} for i in ids}
    if len(images) != len(ids):
        raise ValueError(f"{references_path}: image ids that differ only in type (1 and '1') cannot be told apart")
    means: dict[str, float] = {}
    signatures: dict[str, str] = {}
    df = DocumentFrequencies.load(df_path) if df_path else None
    tokenizer = df.tokenizer if df else "simple"
    for metric in metrics:
        if metric == "cider_d":
            if df is None and len(refs) < 2:
                raise ValueError(
                    f"{references_path}: only one picture; CIDEr-D needs frequencies of a corpus: give --df FILE"
                )
            cider = CiderD(df or DocumentFrequencies.from_references(refs), eos=False)
            columns = {"cider_d": cider.score(candidates, refs)}
            means["cider_d"] = float(columns["cider_d"].mean())
            signatures["cider_d"] = cider.signature
        else:
            bleu = Bleu(4, smooth=False, tokenizer=tokenizer)
            orders = bleu.orders(candidates, refs)
            columns = {f"bleu_{n}": orders[:, n - 1] for n in range(1, 5)}
            means |= {f"bleu_{n}": float(v) for n, v in enumerate(bleu.corpus(candidates, refs), 1)}
            signatures["bleu"] = bleu.signature
        for name, values in columns.items():
            for i, value in zip(ids, values.tolist(), strict=True):
                images[str(i)][name] = value
    return {"means": means, "images": images, "signatures": signatures, "pictures": len(ids)}
