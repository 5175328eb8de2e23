"""BLEU: `evaluate.load(reward_models.evaluate_modules.path("bleu"))`; options and result: .inputs_description."""

from reward_models.evaluate_modules import caption_metric


class Bleu(caption_metric.CaptionMetric):
    metric = "bleu"
    about = "BLEU-1 to BLEU-n of the corpus and, per sample, of the sentence without smoothing, 0 to 1."
    citation_key = "Papineni et al. 2002"
