"""Returns and advantages against hand-worked numbers, O(T^2) definitions and identities."""

import itertools

import pytest
import torch

from mmft.algorithms.returns import discounted_returns, gae, leave_one_out, td_lambda_returns

NAN, INF = float("nan"), float("inf")
COEFFICIENTS = list(itertools.product([0.0, 0.9, 1.0], [0.0, 0.7, 1.0]))


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def ragged(n=6, t=7, seed=0):
    """Random rewards and values; lengths 0, 1, …, t among the rows; garbage in the padding."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(n, t, dtype=torch.float64, generator=generator)
    values = torch.randn(n, t, dtype=torch.float64, generator=generator)
    mask = torch.arange(t) < torch.tensor([t, 0, 1, 4, 2, t])[:n, None]
    return rewards.masked_fill(~mask, NAN), values.masked_fill(~mask, INF), mask


def by_definition(rewards, values, mask, gamma, lam):
    """(returns, advantages, lambda-returns) of each row's real tokens, straight from the sums of the papers."""
    out = torch.zeros(3, *mask.shape, dtype=torch.float64)
    for n, row in enumerate(mask):
        where = row.nonzero().flatten().tolist()
        r = [rewards[n, i].item() for i in where]
        v = [values[n, i].item() for i in where] + [0.0]
        length = len(r)
        for t in range(length):
            future = range(length - t)
            out[0, n, where[t]] = sum(gamma**k * r[t + k] for k in future)
            out[1, n, where[t]] = sum((gamma * lam) ** k * (r[t + k] + gamma * v[t + k + 1] - v[t + k]) for k in future)
            # Sutton & Barto eq. 12.3: n-step returns weighted by (1 - lam) lam^(n-1); the full return takes the rest.
            n_step = [
                sum(gamma**k * r[t + k] for k in range(m)) + gamma**m * v[t + m] for m in range(1, length - t + 1)
            ]
            out[2, n, where[t]] = (
                sum((1 - lam) * lam**m * g for m, g in enumerate(n_step[:-1])) + lam ** (length - t - 1) * n_step[-1]
            )
    return out


def test_discounted_returns_by_hand():
    mask = torch.tensor([[True, True, True], [True, True, False]])
    got = discounted_returns(tensor([1.0, 2.0, 4.0], [1.0, 2.0, NAN]), mask, 0.5)
    assert got.tolist() == [[3.0, 4.0, 4.0], [2.0, 2.0, 0.0]]


def test_gae_by_hand():
    # gamma 0.5, lam 0.5. Row 0: deltas 0 + 2 - 2 = 0, 0 + 4 - 4 = 0, 10 - 8 = 2; A = 2/16, 2/4, 2.
    # Row 1 ends at its second token: deltas 1 + 1 - 2 = 0, 3 - 2 = 1; A = 1/4, 1.
    mask = torch.tensor([[True, True, True], [True, True, False]])
    rewards = tensor([0.0, 0.0, 10.0], [1.0, 3.0, NAN])
    values = tensor([2.0, 4.0, 8.0], [2.0, 2.0, INF])
    advantages, returns = gae(rewards, values, mask, 0.5, 0.5)
    assert advantages.tolist() == [[0.125, 0.5, 2.0], [0.25, 1.0, 0.0]]
    assert returns.tolist() == [[2.125, 4.5, 10.0], [2.25, 3.0, 0.0]]


def test_td_lambda_by_hand():
    # The same rows. Last token: 10. Before: 0.5 (0.5 * 8 + 0.5 * 10) = 4.5; first: 0.5 (0.5 * 4 + 0.5 * 4.5) = 2.125.
    got = td_lambda_returns(
        tensor([0.0, 0.0, 10.0]), tensor([2.0, 4.0, 8.0]), torch.ones(1, 3, dtype=torch.bool), 0.5, 0.5
    )
    assert got.tolist() == [[2.125, 4.5, 10.0]]


@pytest.mark.parametrize("gamma, lam", COEFFICIENTS)
def test_recursions_equal_the_definitions(gamma, lam):
    rewards, values, mask = ragged()
    returns, advantages, lambda_returns = by_definition(rewards, values, mask, gamma, lam)
    got, targets = gae(rewards, values, mask, gamma, lam)
    close = {"atol": 1e-12, "rtol": 0}
    torch.testing.assert_close(discounted_returns(rewards, mask, gamma), returns, **close)
    torch.testing.assert_close(got, advantages, **close)
    torch.testing.assert_close(td_lambda_returns(rewards, values, mask, gamma, lam), lambda_returns, **close)
    # TD(lambda) = GAE + V
    torch.testing.assert_close(targets, lambda_returns, **close)


def test_lam_one_is_the_return_whatever_the_critic_says():
    rewards, values, mask = ragged()
    advantages, _ = gae(rewards, values, mask, 0.9, 1.0)
    expected = by_definition(rewards, values, mask, 0.9, 0.0)[0]
    torch.testing.assert_close((advantages + values)[mask], expected[mask], atol=1e-12, rtol=0)


def test_lam_zero_is_the_td_error():
    rewards, values, mask = ragged()
    advantages, _ = gae(rewards, values, mask, 0.9, 0.0)
    assert advantages[0, 2].item() == pytest.approx((rewards[0, 2] + 0.9 * values[0, 3] - values[0, 2]).item())
    assert advantages[0, -1].item() == pytest.approx((rewards[0, -1] - values[0, -1]).item())


def test_a_perfect_critic_leaves_no_advantage():
    rewards, _, mask = ragged()
    values = by_definition(rewards, torch.zeros_like(rewards), mask, 0.9, 0.0)[0]
    advantages, _ = gae(rewards, values, mask, 0.9, 0.7)
    assert advantages.abs().max() < 1e-12


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e300])
def test_padding_changes_nothing(garbage):
    # Kills: bootstrapping from the value that stands after the last real token.
    rewards, values, mask = ragged()
    filled = [x.masked_fill(~mask, garbage) for x in (rewards, values)]
    zeroed = [x.masked_fill(~mask, 0.0) for x in (rewards, values)]
    for a, b in zip(gae(*filled, mask, 0.9, 0.7), gae(*zeroed, mask, 0.9, 0.7), strict=True):
        assert torch.equal(a, b) and (a[~mask] == 0).all()
    assert torch.equal(td_lambda_returns(*filled, mask, 0.9, 0.7), td_lambda_returns(*zeroed, mask, 0.9, 0.7))
    assert torch.equal(discounted_returns(filled[0], mask, 0.9), discounted_returns(zeroed[0], mask, 0.9))


@pytest.mark.parametrize("holes", [[2], [0], [0, 1, 4], [1, 3, 6]])
def test_masked_tokens_anywhere_are_as_if_cut_out(holes):
    # Left padding and tokens that the policy did not choose: neither a step of discount nor an end of episode.
    rewards, values, _ = ragged(n=1)
    kept = [i for i in range(7) if i not in holes]
    mask = torch.zeros(1, 7, dtype=torch.bool)
    mask[0, kept] = True
    whole = torch.ones(1, len(kept), dtype=torch.bool)
    expected = by_definition(rewards[:, kept], values[:, kept], whole, 0.9, 0.7)
    rewards, values = rewards.masked_fill(~mask, NAN), values.masked_fill(~mask, NAN)
    got = torch.stack(
        [
            discounted_returns(rewards, mask, 0.9),
            gae(rewards, values, mask, 0.9, 0.7)[0],
            td_lambda_returns(rewards, values, mask, 0.9, 0.7),
        ]
    )
    torch.testing.assert_close(got[:, :, kept], expected, atol=1e-12, rtol=0)
    assert (got[:, :, holes] == 0).all()


def test_rows_do_not_touch_each_other():
    rewards, values, mask = ragged()
    together = gae(rewards, values, mask, 0.9, 0.7)[0]
    alone = torch.cat([gae(rewards[i, None], values[i, None], mask[i, None], 0.9, 0.7)[0] for i in range(6)])
    assert torch.equal(together, alone)


def test_dtype_is_kept_and_no_token_is_no_error():
    rewards, values, mask = (x.float() if x.is_floating_point() else x for x in ragged())
    assert all(x.dtype == torch.float32 for x in gae(rewards, values, mask, 1.0, 0.95))
    assert gae(rewards[:, :0], values[:, :0], mask[:, :0], 1.0, 0.95)[0].shape == (6, 0)


def test_leave_one_out_by_hand():
    # Kills: the whole group's mean as baseline (would be -2, -1, 3), strided groups.
    scores = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0], dtype=torch.float64)
    assert leave_one_out(scores, 3).tolist() == [-3.0, -1.5, 4.5, 0.0, 0.0, 0.0]
    assert leave_one_out(torch.tensor([1.0, 4.0]), 2).tolist() == [-3.0, 3.0]


def test_leave_one_out_gradient_is_unbiased():
    # Exact expectation over all pairs of samples of a 3-armed bandit; the whole-group mean would give half of it.
    probs = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    rewards = torch.tensor([1.0, -2.0, 5.0], dtype=torch.float64)
    score = torch.eye(3, dtype=torch.float64) - probs  # row a: d log pi(a) / d logits
    exact = probs * (rewards - (probs * rewards).sum())
    expected = torch.zeros(3, dtype=torch.float64)
    for a, b in itertools.product(range(3), repeat=2):
        advantages = leave_one_out(rewards[[a, b]], 2)
        expected += probs[a] * probs[b] * (advantages[0] * score[a] + advantages[1] * score[b]) / 2
    torch.testing.assert_close(expected, exact, atol=1e-15, rtol=0)


def test_leave_one_out_refuses_groups_it_cannot_compare():
    with pytest.raises(ValueError, match="at least 2"):
        leave_one_out(torch.ones(4), 1)
    with pytest.raises(ValueError, match="whole groups of 3"):
        leave_one_out(torch.ones(4), 3)


def test_leave_one_out_over_the_kept_alone():
    # Kills: a dropped score in its siblings' mean; a mean over G - 1 where fewer are left; a lone survivor's own score.
    scores = torch.tensor([1.0, float("nan"), 4.0, 7.0, 5.0, 6.0])
    keep = torch.tensor([True, False, True, False, True, False])
    assert leave_one_out(scores, 3, keep).tolist() == [-3.0, 0.0, 3.0, 0.0, 0.0, 0.0]
