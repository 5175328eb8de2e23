"""The formulas of docs/equations.md written out once more, slowly, against the functions that it names.

Only those that no other test writes out. Random numbers, float64 where the function takes them.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from mmft.algorithms.losses import a2c_policy_loss
from mmft.training.config import PPOConfig
from mmft.training.distributed import gradient_norm
from mmft.training.schedule import learning_rate_factor
from mmft.vlm.load import BUNDLED
from mmft.vlm.logprobs import Distribution, token_logprobs
from mmft.vlm.policy import ValueHead
from reward_models import Bleu, Cider, CiderD, DocumentFrequencies
from reward_models.preference.fusion import FusionHead
from reward_models.preference.pairs import Rating
from reward_models.preference.training import bradley_terry_loss, train_preference
from reward_models.weights import Shares


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- the policy


@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, None), (1.3, 5.0)])
def test_log_probability_is_the_tempered_softmax(temperature, softcap):
    head = nn.Linear(6, 11, bias=False)
    hidden, targets = torch.randn(9, 6, generator=stream()), torch.tensor([0, 1, 2, 4, 5, 6, 8, 9, 10])
    banned = torch.tensor([3, 7])
    with torch.no_grad():
        found, entropy = token_logprobs(Distribution(head, banned, temperature, softcap), hidden, targets, True)
    for i in range(9):
        z = [float(head.weight[v].detach() @ hidden[i]) for v in range(11)]
        if softcap is not None:
            z = [softcap * math.tanh(x / softcap) for x in z]
        powers = {v: math.exp(x / temperature) for v, x in enumerate(z) if v not in (3, 7)}
        p = {v: power / sum(powers.values()) for v, power in powers.items()}
        assert float(found[i]) == pytest.approx(math.log(p[int(targets[i])]), abs=1e-5)
        assert float(entropy[i]) == pytest.approx(-sum(x * math.log(x) for x in p.values()), abs=1e-5)


def test_value_head_is_linear_and_starts_at_zero():
    head, hidden = ValueHead(5), torch.randn(3, 4, 5, generator=stream())
    assert float(head(hidden).detach().abs().max()) == 0.0
    with torch.no_grad():
        head.weight.copy_(torch.arange(5.0)[None])
        head.bias.fill_(2.0)
    torch.testing.assert_close(head(hidden), (hidden * torch.arange(5.0)).sum(-1) + 2.0)


def test_policy_gradient_is_the_gradient_of_the_expected_reward():
    """E[r grad log pi] over every action equals grad of sum_a pi(a) r(a), for the loss that is minimised."""
    logits = torch.randn(7, generator=stream(), dtype=torch.float64, requires_grad=True)
    rewards = torch.randn(7, generator=stream(1), dtype=torch.float64)
    expected = torch.autograd.grad((logits.softmax(-1) * rewards).sum(), logits)[0]
    found = torch.zeros(7, dtype=torch.float64)
    for action in range(7):
        logprob = logits.log_softmax(-1)[action].view(1, 1)
        loss = a2c_policy_loss(logprob, rewards[action].view(1, 1), torch.ones(1, 1, dtype=torch.bool))
        found += logits.softmax(-1)[action].detach() * torch.autograd.grad(loss, logits)[0]
    torch.testing.assert_close(-found, expected)


# ---- the optimizer step


def test_adamw_is_as_written():
    start = torch.randn(5, generator=stream(), dtype=torch.float64)
    theta = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theta], lr=0.1, weight_decay=0.3)
    m = v = torch.zeros(5, dtype=torch.float64)
    expected = start
    for step in (1, 2, 3):
        g = torch.randn(5, generator=stream(step), dtype=torch.float64)
        theta.grad = g.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        mean_, square = m / (1 - 0.9**step), v / (1 - 0.999**step)
        expected = (1 - 0.1 * 0.3) * expected - 0.1 * mean_ / (square.sqrt() + 1e-8)
    torch.testing.assert_close(theta.detach(), expected)


def test_a_long_gradient_is_shortened_to_its_limit():
    accelerator, layer = Accelerator(cpu=True), nn.Linear(2, 1)
    layer.weight.grad, layer.bias.grad = torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])
    assert float(gradient_norm(accelerator, layer, longest=1.0)) == pytest.approx(5.0)
    assert torch.cat([layer.weight.grad.flatten(), layer.bias.grad]).tolist() == pytest.approx([0.6, 0.0, 0.8])
    gradient_norm(accelerator, layer, longest=9.0)
    assert float(layer.bias.grad) == pytest.approx(0.8)


def test_learning_rates_by_hand():
    def at(step, kind, warmup=0):
        return learning_rate_factor(step, PPOConfig(max_steps=4, lr_scheduler_type=kind, warmup_steps=warmup))

    assert [at(s, "constant", warmup=2) for s in (1, 2, 3)] == [0.5, 1.0, 1.0]
    assert [at(s, "linear") for s in (1, 2, 4)] == [1.0, 0.75, 0.25]
    assert [at(s, "cosine") for s in (1, 3)] == pytest.approx([1.0, 0.5])
    assert at(1, "linear", warmup=4) == 0.25


# ---- caption metrics


def _grams(words, n):
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _slow_cider(candidate, references, corpus, clipped, sigma=6.0):
    documents = len(corpus)
    total = 0.0
    for reference, n in product(references, (1, 2, 3, 4)):
        c, s = candidate.split(), reference.split()
        df = Counter(g for pictures in corpus for g in {g for text in pictures for g in _grams(text.split(), n)})
        g_c, g_s = (
            {k: h * (math.log(documents) - math.log(max(1, df[k]))) for k, h in _grams(words, n).items()}
            for words in (c, s)
        )
        norms = [math.sqrt(sum(x * x for x in g.values())) for g in (g_c, g_s)]
        if not all(norms):
            continue
        dot = sum((min(x, g_s.get(k, 0.0)) if clipped else x) * g_s.get(k, 0.0) for k, x in g_c.items())
        penalty = math.exp(-((len(c) - len(s)) ** 2) / (2 * sigma**2)) if clipped else 1.0
        total += penalty * dot / (norms[0] * norms[1])
    return 10 * total / (4 * len(references))


def _slow_bleu(candidate, references):
    c, refs = candidate.split(), [reference.split() for reference in references]
    closest = min((abs(len(r) - len(c)), len(r)) for r in refs)[1]
    precisions = []
    for n in (1, 2, 3, 4):
        own = _grams(c, n)
        most = Counter()
        for r in refs:
            most |= _grams(r, n)
        extra = int(n > 1)
        precisions.append((sum((own & most).values()) + extra) / (sum(own.values()) + extra))
    return min(1.0, math.exp(1 - closest / len(c))) * math.prod(precisions) ** 0.25


def sentences(count, seed):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(list("abcdef"), size=rng.integers(4, 12))) for _ in range(count)]


CORPUS = [sentences(3, seed) for seed in range(8)]


@pytest.mark.parametrize(("cls", "clipped"), [(CiderD, True), (Cider, False)])
def test_cider_is_its_definition(cls, clipped):
    metric = cls(DocumentFrequencies.from_references(CORPUS, tokenizer="whitespace"), eos=False)
    candidates = sentences(8, 99)
    expected = [_slow_cider(c, refs, CORPUS, clipped) for c, refs in zip(candidates, CORPUS, strict=True)]
    assert min(expected) > 0.01
    np.testing.assert_allclose(metric.score(candidates, CORPUS), expected, rtol=1e-9)


def test_bleu_is_its_definition():
    candidates = sentences(8, 99)
    expected = [_slow_bleu(c, refs) for c, refs in zip(candidates, CORPUS, strict=True)]
    np.testing.assert_allclose(Bleu(tokenizer="whitespace").score(candidates, CORPUS), expected, rtol=1e-9)


# ---- several rewards together


def test_a_share_is_a_share_of_the_spread():
    rng = np.random.default_rng(0)
    main, extra = rng.normal(size=24), 50 * rng.normal(size=24)
    shares = Shares({"extra": 0.3}, ["main"])
    shares.update({"extra": extra, "main": main}, 4, None)

    def spread(x):
        groups = x.reshape(-1, 4)
        return math.sqrt(np.mean([np.var(group, ddof=1) for group in groups]))

    weighted = shares.weights["extra"] * spread(extra)
    assert weighted / (weighted + spread(main)) == pytest.approx(0.3)


# ---- the preference head


def _fused(head: FusionHead):
    """(text t, picture p, what the head makes of them) for random states, by the head's own projections."""
    text, logprobs = torch.randn(3, 4, 8, generator=stream()), torch.randn(3, 4, generator=stream(1))
    picture = torch.randn(3, 5, 8, generator=stream(2))
    text_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    picture_mask = torch.ones(3, 5, dtype=torch.bool)
    states = torch.cat([head.text_norm(text), logprobs[..., None]], -1)
    seen = head.picture_norm(picture)
    return states, text_mask, seen, head(text, logprobs, text_mask, picture, picture_mask)


def _last_and_mean(states, mask):
    rows = [row[own] for row, own in zip(states, mask, strict=True)]
    return torch.stack([torch.cat([row[-1], row.mean(0)]) for row in rows])


def _reward(head: FusionHead, fused):
    gelu = nn.functional.gelu
    return gelu(gelu(fused) @ head.hidden.weight.T + head.hidden.bias) @ head.reward.weight[0] + head.reward.bias


@pytest.mark.parametrize("fusion", ["concat", "sum", "gated"])
def test_fusions_are_as_written(fusion):
    torch.manual_seed(0)
    head = FusionHead(8, 8, 12, fusion).eval()
    if fusion == "sum":
        nn.init.constant_(head.balance, 0.7)
    states, mask, seen, found = _fused(head)
    t, p = head.text(_last_and_mean(states, mask)), head.picture(seen.mean(1))
    if fusion == "sum":
        a = 1 / (1 + math.exp(-0.7))
        fused = a * t + (1 - a) * p
    else:
        fused = torch.cat([t, p], -1) @ head.join.weight.T + head.join.bias
    if fusion == "gated":
        z = 1 / (1 + (-fused).exp())
        fused = z * t.tanh() + (1 - z) * p.tanh()
    torch.testing.assert_close(found, _reward(head, fused))


def test_cross_modal_attention_is_as_written():
    torch.manual_seed(0)
    head = FusionHead(8, 8, 12, "cross_attention").eval()
    states, mask, seen, found = _fused(head)
    # the "no picture" vector stands before every picture
    seen = torch.cat([head.picture_norm(head.no_picture).expand(3, 1, -1), seen], 1)
    q, (k, v) = head.query(states), head.key_value(seen).split(12, -1)
    got = []
    for h in range(4):
        part = slice(3 * h, 3 * h + 3)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(3)).softmax(-1)
        got.append(weights @ v[..., part])
    attended = head.residual(states) + head.out(torch.cat(got, -1))
    torch.testing.assert_close(found, _reward(head, head.text(_last_and_mean(attended, mask))))


def test_bradley_terry_is_the_likelihood_of_the_choice():
    chosen, rejected = torch.randn(2, 20, generator=stream(), dtype=torch.float64)
    p = chosen.exp() / (chosen.exp() + rejected.exp())
    torch.testing.assert_close(bradley_terry_loss(chosen, rejected), -p.log())


def test_ratings_are_learned_by_squared_error(tmp_path):
    """One step that moves nothing: its loss, against the rewards of the head that it leaves."""
    from reward_models.preference.reward import PreferenceReward

    picture = Image.new("RGB", (32, 32), (200, 30, 30))
    numbers = [1.0, 2.0, 4.0, 9.0]
    ratings = [Rating("what is it?", (picture,), f"a {i} thing", number) for i, number in enumerate(numbers)]
    options = {"lora": 0, "steps": 1, "batch_size": 4, "dropout": 0.0, "width": 16, "head_learning_rate": 1e-12}
    train_preference(ratings, tmp_path, log=None, backbone=str(BUNDLED["scenes-vlm"]), **options)
    columns = {"prompts": [r.prompt for r in ratings], "completions": [r.completion for r in ratings]}
    got = np.asarray(PreferenceReward.load(tmp_path)(images=[[picture]] * 4, **columns).values)
    expected = np.mean(((got - numbers) / np.std(numbers)) ** 2)
    found = json.loads((tmp_path / "preference.json").read_text())["metrics"]["train_loss"]
    assert found == pytest.approx(expected, rel=1e-3)
