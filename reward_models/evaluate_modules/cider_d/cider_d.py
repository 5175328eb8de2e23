"""CIDEr-D: `evaluate.load(reward_models.evaluate_modules.path("cider_d"))`; options and result: .inputs_description."""

from reward_models.evaluate_modules import caption_metric


class CiderD(caption_metric.CaptionMetric):
    metric = "cider_d"
    about = "CIDEr-D: clipped tf-idf cosine of n-grams with a length penalty, 0 to 10."
    citation_key = "Vedantam, Zitnick and Parikh 2015, arXiv 1411.5726"
