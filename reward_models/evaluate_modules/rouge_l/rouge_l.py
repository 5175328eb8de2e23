"""ROUGE-L: `evaluate.load(reward_models.evaluate_modules.path("rouge_l"))`; options and result: .inputs_description."""

from reward_models.evaluate_modules import caption_metric


class RougeL(caption_metric.CaptionMetric):
    metric = "rouge_l"
    about = "ROUGE-L: F-score of the longest common subsequence, 0 to 1."
    citation_key = "Lin 2004"
