"""KL estimators against the exact KL of small distributions, and the coefficient controllers."""

import math

import pytest
import torch

from mmft.algorithms.kl import AdaptiveKL, FixedKL, kl_estimate

P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
Q = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)


def test_literal_values():
    logprobs = torch.tensor([math.log(0.5), math.log(0.25)], dtype=torch.float64)
    ref = torch.tensor([math.log(0.25), math.log(0.5)], dtype=torch.float64)
    ln2 = 0.6931471805599453
    expected = {
        "k1": [ln2, -ln2],
        "k2": [0.2402265069591007, 0.2402265069591007],  # ln2^2 / 2
        "k3": [0.5 - 1 + ln2, 2 - 1 - ln2],
    }
    for kind, values in expected.items():
        got = kl_estimate(logprobs, ref, kind)
        torch.testing.assert_close(got, torch.tensor(values, dtype=torch.float64), atol=1e-15, rtol=0)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_expectation_under_the_policy_is_the_exact_kl(kind):
    # Kills: reference and policy swapped. KL(P||Q) = 0.5 ln 2.5 + 0.3 ln 1.5 + 0.2 ln (1/3).
    exact = 0.5 * math.log(2.5) + 0.3 * math.log(1.5) - 0.2 * math.log(3)
    assert (P * kl_estimate(P.log(), Q.log(), kind)).sum().item() == pytest.approx(exact, abs=1e-15)


def test_k2_agrees_to_second_order():
    # E k2 / KL -> 1 as the distributions meet.
    near = P + 1e-4 * torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64)
    exact = (P * (P / near).log()).sum()
    assert (P * kl_estimate(P.log(), near.log(), "k2")).sum().item() == pytest.approx(exact.item(), rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_is_never_negative(dtype):
    # Kills exp(d) - 1 - d, which loses its digits near 0 and falls below it.
    d = torch.cat([torch.logspace(-30, 1, 2000, dtype=dtype), torch.zeros(1, dtype=dtype)])
    d = torch.cat([d, -d])
    k3 = kl_estimate(torch.zeros_like(d), d, "k3")
    assert k3.dtype == dtype and (k3 >= 0).all()


def test_k3_keeps_its_digits_near_zero():
    d = torch.tensor([1e-5], dtype=torch.float64)
    assert kl_estimate(torch.zeros_like(d), d, "k3").item() == pytest.approx(0.5e-10 + 1e-15 / 6, rel=1e-4)


def test_unknown_kind_lists_the_known_ones():
    with pytest.raises(ValueError, match="'k4'.*k1, k2, k3"):
        kl_estimate(P, Q, "k4")


def test_fixed_stays():
    kl = FixedKL(0.05)
    kl.update(100.0, 10_000)
    assert kl.value == 0.05


def test_adaptive_literal_steps():
    kl = AdaptiveKL(0.1, target=6.0, horizon=1000)
    kl.update(6.6, 100)  # error 0.1, times 100 / 1000
    assert kl.value == pytest.approx(0.1 * 1.01, abs=1e-15)
    kl.update(5.4, 100)
    assert kl.value == pytest.approx(0.1 * 1.01 * 0.99, abs=1e-15)
    kl.update(6.0, 100)
    assert kl.value == pytest.approx(0.1 * 1.01 * 0.99, abs=1e-15)


@pytest.mark.parametrize("measured, factor", [(1e9, 1.2), (-1e9, 0.8), (0.0, 0.8)])
def test_adaptive_is_bounded_even_when_the_batch_outgrows_the_horizon(measured, factor):
    # Kills: 1 - 0.2 * 10_000 / 100 = -19, a penalty that becomes a reward.
    kl = AdaptiveKL(0.1, target=6.0, horizon=100)
    kl.update(measured, 10_000)
    assert kl.value == pytest.approx(0.1 * factor, abs=1e-15)


def test_adaptive_closes_the_loop():
    # A policy whose KL is 1 / coefficient settles where the KL is the target.
    kl = AdaptiveKL(1.0, target=4.0, horizon=100)
    for _ in range(300):
        kl.update(1 / kl.value, 50)
    assert 1 / kl.value == pytest.approx(4.0, rel=1e-3)


def test_state_makes_the_next_update_the_same():
    one = AdaptiveKL(0.1, 6.0, 1000)
    one.update(9.0, 256)
    other = AdaptiveKL(0.7, 6.0, 1000)
    other.load_state_dict(one.state_dict())
    one.update(3.0, 256)
    other.update(3.0, 256)
    assert one.value == other.value


def test_bad_arguments():
    for bad in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="kl_coef"):
            FixedKL(bad)
    assert FixedKL(0).value == 0
    for arguments, name in (((0, 6, 10), "kl_coef"), ((0.1, 0, 10), "target"), ((0.1, 6, 0), "horizon")):
        with pytest.raises(ValueError, match=name):
            AdaptiveKL(*arguments)
    kl = AdaptiveKL(0.1, 6.0, 1000)
    with pytest.raises(ValueError, match="nan"):
        kl.update(math.nan, 1)  # min/max would have made it -0.2 or 0.2 in silence
    assert kl.value == 0.1
    with pytest.raises(ValueError, match="'value'"):
        kl.load_state_dict({})
