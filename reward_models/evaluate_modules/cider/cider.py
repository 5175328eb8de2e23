"""CIDEr: `evaluate.load(reward_models.evaluate_modules.path("cider"))`; options and result: .inputs_description."""

from reward_models.evaluate_modules import caption_metric


class Cider(caption_metric.CaptionMetric):
    metric = "cider"
    about = "CIDEr as first defined: tf-idf cosine of n-grams, 0 to 10."
    citation_key = "Vedantam, Zitnick and Parikh 2015, arXiv 1411.5726"
