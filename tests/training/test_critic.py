"""The critic's start: a least-squares fit that no response can see its own return through."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_credit import sampled
from test_trainer import trainer_of

from mmft.algorithms.returns import discounted_returns
from mmft.training import rollout as stages
from mmft.training.critic import _error, _ridge, fit_critic


def products(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    rows = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype), y[:, None]], 1)
    return rows.T @ rows


def test_ridge_is_that_of_standardised_features():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.1, 2.0, 30.0]) + 3
    y = x @ torch.tensor([1.0, -0.2, 4.0, 0.0, 0.1], dtype=torch.float64) + 7
    ridge = 0.1
    # The same by augmented least squares, on standardised columns.
    mean, std = x.mean(0), x.std(0, unbiased=False)
    z = ((x - mean) / std).numpy()
    rows = np.concatenate([z, np.sqrt(ridge * len(z)) * np.eye(5)])
    slopes = np.linalg.lstsq(rows, np.concatenate([(y - y.mean()).numpy(), np.zeros(5)]), rcond=None)[0]
    expected = z @ slopes + y.mean().item()
    fit = _ridge(products(x, y), ridge)
    np.testing.assert_allclose((x @ fit[:-1] + fit[-1]).numpy(), expected, rtol=1e-6)
    error = ((x @ fit[:-1] + fit[-1] - y) ** 2).sum()
    assert _error(products(x, y), fit).item() == pytest.approx(error.item())
    assert _ridge(products(x, y), float("inf")).tolist() == [0.0] * 5 + [pytest.approx(y.mean().item())]


def scored(tiny_model, folder, change=None, **options):
    trainer = trainer_of(tiny_model, folder, kl_coef=0.0, **options)
    rollout, _ = sampled(trainer)
    if change:
        change(rollout)
    stages.earn(rollout, trainer.config, 0.0)
    fit_critic(trainer.policy, rollout, trainer.config, [0, 1, 0, 1])
    return trainer, rollout


def test_a_constant_score_is_foreseen_at_once(tiny_model, tmp_path):
    def same(rollout):
        rollout.scores = torch.full_like(rollout.scores, 2.5)

    trainer, rollout = scored(tiny_model, tmp_path, same)
    mask = rollout.responses.mask
    torch.testing.assert_close(rollout.old.values[mask], torch.full((int(mask.sum()),), 2.5))
    values = trainer.policy(rollout.prompts, rollout.responses).values[mask]
    torch.testing.assert_close(values, torch.full_like(values, 2.5), atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [None, 1])
def test_no_response_sees_its_own_return(tiny_model, tmp_path, size):
    # Kills: values of the fit to all rows; rows of the halves mixed up; microbatches in another order.
    def raised(rollout):
        rollout.scores = rollout.scores + torch.tensor([0.0] * 6 + [50.0] * 3 + [0.0] * 3)  # the third prompt's

    (_, plain), (_, other) = (
        scored(tiny_model, tmp_path / str(i), c, micro_prompts=size) for i, c in enumerate((None, raised))
    )
    own, rest = plain.old.values.view(4, -1), other.old.values.view(4, -1)
    assert (own[1] - rest[1]).abs().max() > 1 and (own[3] - rest[3]).abs().max() > 1
    # The penalty may change with the data, so not bitwise; with prompts 0 and 2 in one half they never see each other.
    returns = [discounted_returns(r.rewards, r.responses.mask, 1.0).view(4, -1) for r in (plain, other)]
    assert (returns[1][2] - returns[0][2]).abs().max() > 49
    assert (own[2] - rest[2]).abs().max() < 5 and (own[0] - rest[0]).abs().max() < 5


def test_sums_over_processes_make_the_head(tiny_model, tmp_path):
    trainer, rollout = scored(tiny_model, tmp_path)
    alone = trainer.policy.value_head.bias.item()
    # Another process, whose two products of (one, return) and (return, return) speak of higher returns.
    fit_critic(trainer.policy, rollout, trainer.config, [0, 1, 0, 1], reduce=lambda sums: sums + sums.abs().max())
    assert trainer.policy.value_head.bias.item() != alone


def test_with_one_prompt_the_critic_starts_at_a_mean(tiny_model, tmp_path):
    # There is no other half to choose a penalty by: an unpenalised fit would know every return by heart.
    trainer, rollout = scored(tiny_model, tmp_path)
    fit_critic(trainer.policy, rollout, trainer.config, [1, 1, 1, 1])
    assert not trainer.policy.value_head.weight.any() and trainer.policy.value_head.bias.any()


def test_it_can_be_left_at_zero(tiny_model, tmp_path):
    trainer = trainer_of(tiny_model, tmp_path, critic_start="zero", vf_coef=0.0)
    trainer.step(1)
    assert not trainer.policy.value_head.weight.any()
    with pytest.raises(ValueError, match="critic_start='ones': expected one of fit, zero"):
        trainer_of(tiny_model, tmp_path, critic_start="ones")
