"""METEOR: `evaluate.load(reward_models.evaluate_modules.path("meteor"))`; options and result: .inputs_description."""

from reward_models.evaluate_modules import caption_metric


class Meteor(caption_metric.CaptionMetric):
    metric = "meteor"
    about = "METEOR 1.5 through Java: alignment with stems, synonyms and paraphrases, 0 to 1."
    citation_key = "Denkowski and Lavie 2014"
