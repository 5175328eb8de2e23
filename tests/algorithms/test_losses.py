"""Losses: hand-worked values, which side the clip cuts, gradients, shares of a whole, garbage in the padding."""

import math

import pytest
import torch

from mmft.algorithms.losses import a2c_policy_loss, entropy_from_logits, ppo_policy_loss, value_loss

NAN, INF = float("nan"), float("inf")
F64 = torch.float64


def row(*numbers):
    return torch.tensor([numbers], dtype=F64)


def all_true(x):
    return torch.ones_like(x, dtype=torch.bool)


def random_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    new, old, advantages = (torch.randn(4, 5, dtype=F64, generator=generator) for _ in range(3))
    mask = torch.arange(5) < torch.tensor([[5], [2], [0], [3]])
    return new * 0.3, old * 0.3, advantages, mask


def ppo_by_definition(new, old, advantages, mask, low, high):
    total = 0.0
    for index in mask.nonzero().tolist():
        r, a = math.exp(new[*index] - old[*index]), advantages[*index].item()
        total += min(r * a, min(max(r, 1 - low), 1 + high) * a)
    return -total / int(mask.sum())


def test_ppo_by_hand():
    # Ratios 2, 0.5, 2, 0.5 with clip 0.2. A > 0: min(2, 1.2) = 1.2 and min(0.5, 0.8) = 0.5.
    # A = -1: min(-2, -1.2) = -2 and min(-0.5, -0.8) = -0.8. Sum 1.2 + 0.5 - 2 - 0.8 = -1.1.
    ln2 = math.log(2)
    new = row(ln2, -ln2, ln2, -ln2)
    loss, stats = ppo_policy_loss(new, torch.zeros_like(new), row(1.0, 1.0, -1.0, -1.0), all_true(new), 0.2)
    assert loss.item() == pytest.approx(1.1 / 4, abs=1e-15)
    assert stats["ratio_mean"].item() == pytest.approx(1.25, abs=1e-15)
    assert stats["ratio_max"].item() == pytest.approx(2.0, abs=1e-15)
    assert stats["clip_fraction"].item() == 0.5  # the first and the last
    assert stats["approx_kl"].item() == pytest.approx(0.25, abs=1e-15)  # mean of 1 - ln2 and ln2 - 0.5


@pytest.mark.parametrize("cliprange, low, high", [(0.2, 0.2, 0.2), ((0.1, 0.3), 0.1, 0.3), (0.0, 0.0, 0.0)])
def test_ppo_equals_its_definition_on_ragged_rows(cliprange, low, high):
    new, old, advantages, mask = random_batch()
    expected = ppo_by_definition(new, old, advantages, mask, low, high)
    assert ppo_policy_loss(new, old, advantages, mask, cliprange)[0].item() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize(
    "ratio, advantage, gradient",
    [
        # d loss / d new = -A r where the gradient lives, exactly 0 where the clip has taken it.
        (1.5, 2.0, 0.0),
        (1.5, -2.0, 3.0),
        (0.5, 2.0, -1.0),
        (0.5, -2.0, 0.0),
        (1.1, 2.0, -2.2),
        (0.9, -2.0, 1.8),
        (1.5, 0.0, 0.0),
    ],
)
def test_clip_cuts_the_gradient_on_one_side_only(ratio, advantage, gradient):
    new = row(math.log(ratio)).requires_grad_()
    loss, stats = ppo_policy_loss(new, row(0.0), row(advantage), all_true(new), 0.2)
    loss.backward()
    if gradient == 0:
        assert new.grad.item() == 0.0
    assert new.grad.item() == pytest.approx(gradient, abs=1e-14)
    assert stats["clip_fraction"].item() == float(gradient == 0 and advantage != 0)


def test_asymmetric_clip_takes_low_before_high():
    # (0.1, 0.5): a ratio of 1.4 is within, 0.8 is beyond.
    new = row(math.log(1.4), math.log(0.8)).requires_grad_()
    ppo_policy_loss(new, row(0.0, 0.0), row(1.0, -1.0), all_true(new), (0.1, 0.5), 1.0)[0].backward()
    assert new.grad[0, 0].item() == pytest.approx(-1.4) and new.grad[0, 1].item() == 0.0


def test_ppo_gradient_at_ratio_one_is_a2cs():
    # Kills: the tie of min at ratio 1 halving or dropping gradients, even with a clip of 0.
    new, _, advantages, mask = random_batch()
    for cliprange in (0.2, 0.0, 1e9):
        one, other = new.clone().requires_grad_(), new.clone().requires_grad_()
        ppo_policy_loss(one, new, advantages, mask, cliprange)[0].backward()
        a2c_policy_loss(other, advantages, mask).backward()
        torch.testing.assert_close(one.grad, other.grad, atol=1e-15, rtol=0)


def test_approx_kl_is_that_of_the_sampling_policy():
    # Kills: KL(new || old). One token, log-ratio ln 2: k3 = 2 - 1 - ln 2, the other way 1/2 - 1 + ln 2.
    stats = ppo_policy_loss(row(math.log(2)), row(0.0), row(1.0), all_true(row(0.0)), 0.2)[1]
    assert stats["approx_kl"].item() == pytest.approx(1 - math.log(2), abs=1e-15)


def test_a2c_by_hand():
    new = row(-1.0, -2.0, NAN).requires_grad_()
    loss = a2c_policy_loss(new, row(3.0, -0.5, INF), torch.tensor([[True, True, False]]))
    loss.backward()
    assert loss.item() == 1.0  # -(-3 + 1) / 2
    assert new.grad.tolist() == [[-1.5, 0.25, 0.0]]


def test_value_loss_by_hand():
    # R = 1. V 0 -> error 1. V 3 -> error 4.
    loss, stats = value_loss(row(0.0, 3.0), row(9.0, 9.0), row(1.0, 1.0), all_true(row(0.0, 0.0)))
    assert loss.item() == 0.5 * 5 / 2 and stats["clip_fraction"].item() == 0.0


@pytest.mark.parametrize(
    "new, returns, loss, gradient",
    [
        # Old value 0, clip 0.5.
        (2.0, 3.0, 0.5 * 2.5**2, 0.0),  # moved too far towards the return: held at 0.5, no gradient
        (2.0, -1.0, 0.5 * 3.0**2, 3.0),  # moved away from it: the whole error, whole gradient
        (0.3, 3.0, 0.5 * 2.7**2, -2.7),  # within the clip
        (-2.0, -3.0, 0.5 * 2.5**2, 0.0),
        (2.0, 0.9, 0.5 * 1.1**2, 1.1),  # past the return: the plain error is the larger one
    ],
)
def test_value_clip_cuts_the_gradient_on_one_side_only(new, returns, loss, gradient):
    new = row(new).requires_grad_()
    got, stats = value_loss(new, row(0.0), row(returns), all_true(new), 0.5)
    got.backward()
    assert got.item() == pytest.approx(loss, abs=1e-15)
    assert new.grad.item() == pytest.approx(gradient, abs=1e-15)
    assert stats["clip_fraction"].item() == float(gradient == 0)


def losses_of(new, old, third, mask, denominator=None):
    return (
        ppo_policy_loss(new, old, third, mask, 0.2, denominator)[0],
        value_loss(new, old, third, mask, None, denominator)[0],
        value_loss(new, old, third, mask, 0.2, denominator)[0],
        a2c_policy_loss(new, third, mask, denominator),
    )


@pytest.mark.parametrize("denominator", [10, 10.0, torch.tensor(10)])
def test_shares_of_microbatches_add_up_to_the_whole(denominator):
    # Kills: means of means. The rows hold 5, 2, 0 and 3 tokens.
    new, old, third, mask = random_batch()
    whole = losses_of(new, old, third, mask)
    shares = [losses_of(*(x[i, None] for x in (new, old, third, mask)), denominator) for i in range(4)]
    for i, loss in enumerate(whole):
        assert sum(share[i] for share in shares).item() == pytest.approx(loss.item(), abs=1e-14)


def test_no_token_is_a_loss_of_zero_with_a_gradient_of_zero():
    new, old, third, mask = random_batch()
    for denominator in (None, 0):
        for i in range(4):
            leaf = new.clone().requires_grad_()
            loss = losses_of(leaf, old, third, torch.zeros_like(mask), denominator)[i]
            loss.backward()
            assert loss.item() == 0.0 and (leaf.grad == 0).all()
    stats = ppo_policy_loss(new, old, third, torch.zeros_like(mask), 0.2)[1]
    assert all(value.item() == 0.0 for value in stats.values())


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e300])
def test_padding_changes_neither_value_nor_gradient(garbage):
    new, old, third, mask = random_batch()
    clean = [x.masked_fill(~mask, 0.0) for x in (new, old, third)]
    dirty = [x.masked_fill(~mask, garbage) for x in (new, old, third)]
    for i in range(4):
        leaves = [x[0].clone().requires_grad_() for x in (clean, dirty)]
        one = losses_of(leaves[0], *clean[1:], mask)[i]
        other = losses_of(leaves[1], *dirty[1:], mask)[i]
        one.backward()
        other.backward()
        assert torch.equal(one, other) and torch.equal(leaves[0].grad, leaves[1].grad)
        assert (leaves[1].grad[~mask] == 0).all() and (leaves[1].grad[mask] != 0).any()
    stats = [ppo_policy_loss(*x, mask, 0.2)[1] for x in (clean, dirty)]
    assert all(torch.equal(stats[0][name], stats[1][name]) for name in stats[0])


def test_only_the_new_side_learns():
    new, old, third, mask = (x.requires_grad_() if x.is_floating_point() else x for x in random_batch())
    sum(losses_of(new, old, third, mask)).backward()
    assert new.grad is not None and old.grad is None and third.grad is None
    assert not any(v.requires_grad for v in ppo_policy_loss(new, old, third, mask, 0.2)[1].values())


def test_losses_keep_the_dtype():
    new, old, third, mask = (x.float() if x.is_floating_point() else x for x in random_batch())
    assert all(x.dtype == torch.float32 for x in losses_of(new, old, third, mask, torch.tensor(10)))


def test_entropy_by_hand():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [math.log(3), 0.0, -INF, -INF], [5.0, -INF, -INF, -INF]], dtype=F64)
    # Uniform over 4: ln 4. (3/4, 1/4): ln 4 - 0.75 ln 3. One choice: 0.
    expected = torch.tensor([math.log(4), math.log(4) - 0.75 * math.log(3), 0.0], dtype=F64)
    torch.testing.assert_close(entropy_from_logits(logits), expected, atol=1e-15, rtol=0)


def test_entropy_does_not_move_with_a_constant_and_survives_extremes():
    logits = torch.tensor([1.0, 2.0, -1.0], dtype=F64)
    assert entropy_from_logits(logits + 1e4).item() == pytest.approx(entropy_from_logits(logits).item(), abs=1e-11)
    assert entropy_from_logits(torch.tensor([1e4, 0.0, -1e4])).item() == 0.0


def test_entropy_gradient_with_banned_tokens():
    # dH/dlogit_v = -p_v (log p_v + H); a banned token gets exactly 0, not NaN.
    logits = torch.tensor([1.0, -INF, 0.5, -2.0], dtype=F64, requires_grad=True)
    entropy_from_logits(logits).backward()
    weights = [math.exp(1.0), math.exp(0.5), math.exp(-2.0)]
    p = [w / sum(weights) for w in weights]
    entropy = -sum(x * math.log(x) for x in p)
    a, b, c = (-x * (math.log(x) + entropy) for x in p)
    torch.testing.assert_close(logits.grad, torch.tensor([a, 0.0, b, c], dtype=F64), atol=1e-15, rtol=0)
