"""SPICE: `evaluate.load(reward_models.evaluate_modules.path("spice"))`; options and result: .inputs_description."""

from reward_models.evaluate_modules import caption_metric


class Spice(caption_metric.CaptionMetric):
    metric = "spice"
    about = "SPICE 1.0 through Java: F1 of scene-graph tuples, 0 to 1."
    citation_key = "Anderson et al. 2016, arXiv 1607.08822"
