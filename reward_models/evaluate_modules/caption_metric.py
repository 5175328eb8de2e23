"""What all modules here share: strings against lists of strings, scored by `reward_models.metrics.coco.score_rows`."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from reward_models.metrics.coco import score_rows
from reward_models.metrics.ngrams import DocumentFrequencies

_INPUTS = """
Args:
    predictions: list of str, one caption per sample.
    references: list of lists of str, the captions that each is compared with.
    document_frequencies: a file saved by reward_models.DocumentFrequencies (cider, cider_d; its tokenizer counts for
        all metrics). Default: counted over the references given, one document per sample, as the COCO server does.
    tokenizer: name of a tokenizer, see reward_models.metrics.text. Default: simple, or that of document_frequencies.
    further options: those of the metric's class in reward_models, for instance eos=True (cider, cider_d, bleu).
    Every option can also be given to evaluate.load, as what compute then starts from.
Returns:
    <metric>: the mean (for bleu, bleu_1 to bleu_n, and for meteor: the score of the whole corpus),
    <metric>_scores: one score per sample,
    <metric>_signature: everything the scores depend on,
    <metric>_document_frequencies (cider, cider_d): the file, or "references".
"""


class CaptionMetric(evaluate.Metric):
    """Base of the modules; `metric` names one of `reward_models.metrics.coco.METRICS`."""

    metric: str
    about: str
    citation_key: str

    # evaluate.load hands over these by keyword; what is left are options of the metric
    _OF_EVALUATE = frozenset(
        "config_name keep_in_memory cache_dir num_process process_id seed experiment_id hash timeout "
        "max_concurrent_cache_files".split()
    )

    def __init__(self, **options: Any) -> None:
        super().__init__(**{key: options.pop(key) for key in list(options) if key in self._OF_EVALUATE})
        self._options = options

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.about,
            citation=self.citation_key,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions: list[str], references: list[list[str]], **options: Any) -> dict[str, Any]:
        options = self._options | options
        file = options.pop("document_frequencies", None)
        df = DocumentFrequencies.load(file) if file is not None else None
        scores = score_rows(self.metric, predictions, references, df=df, **options)
        out: dict[str, Any] = dict(scores.means)
        out |= {f"{name}_scores": values.tolist() for name, values in scores.rows.items()}
        out[f"{self.metric}_signature"] = scores.signature
        if self.metric in ("cider", "cider_d"):
            out[f"{self.metric}_document_frequencies"] = "references" if file is None else str(file)
        return out
