"""What pages take for granted: names that their Python uses without making them, as a reader would have them."""

SAMPLES = """
from mmft import load_rows
from reward_models import CiderD, DocumentFrequencies
rows = load_rows("scenes", "train", limit=8)
references = training_references = rows.references()
pictures, prompts = [row["image"] for row in rows], [row["prompt"] for row in rows]
texts = predictions = [texts[0] for texts in references]
ended = [True] * len(texts)
df = DocumentFrequencies.from_references(references)
"""
PIECES = """
from reward_models import Bleu
metric = CiderD(df)
pieces = [[" " * (i > 0) + word for i, word in enumerate(text.split())] for text in texts]
def short(completions, **columns):
    return [float(len(text) < 60) for text in completions]
"""
PAIRS = """
from reward_models.preference import Pair
pairs = [Pair(prompts[i], (pictures[i],), texts[i], "a cat") for i in (0, 1)]
held_out = [Pair(prompts[i], (pictures[i],), texts[i], "a cat") for i in (2, 3)]
"""
MEDIA = """
dataset = [{"prompt": "What is it?", "video": [], "audio": b""}]
"""
TEST = """
import pytest, tiny_models
from transformers import AutoModelForImageTextToText
"""
GIVEN = {
    "docs/rewards/README.md": SAMPLES,
    "docs/rewards/combination.md": SAMPLES + PIECES,
    "docs/rewards/dense_credit.md": SAMPLES + PIECES,
    "docs/rewards/evaluate_modules.md": SAMPLES,
    "docs/rewards/preference.md": SAMPLES + PAIRS,
    "data/README.md": MEDIA,
    "CONTRIBUTING.md": TEST,
}
