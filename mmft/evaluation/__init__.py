"""Held-out evaluation: metrics per sample, how sure they are, and the report of a run."""

from mmft.evaluation.captioning import CaptionScores, compare, score_captions, summarise
from mmft.evaluation.report import write_report
from mmft.evaluation.statistics import bootstrap_interval, mean_interval, paired_bootstrap, ratio_interval

__all__ = [
    "CaptionScores",
    "bootstrap_interval",
    "compare",
    "mean_interval",
    "paired_bootstrap",
    "ratio_interval",
    "score_captions",
    "summarise",
    "write_report",
]
