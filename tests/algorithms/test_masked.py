"""Masked statistics against literal numbers, torch's own statistics of the compressed values, and simulated ranks."""

import threading

import pytest
import torch

from mmft.algorithms.masked import (
    explained_variance,
    masked_mean,
    masked_sum,
    masked_var,
    masked_whiten,
    zero_outside,
)

NAN, INF = float("nan"), float("inf")
MASK = torch.tensor([[True, True, False], [True, False, False]])
X = torch.tensor([[1.0, 2.0, NAN], [6.0, INF, -INF]], dtype=torch.float64)


def two_ranks(function):
    """Calls function(rank, reduce) in two threads whose reduce sums over both, as all_reduce would."""
    barrier, sent, results, errors = threading.Barrier(2, timeout=20), [None, None], [None, None], []

    def work(rank):
        def reduce(sums):
            assert sums.dim() == 1
            sent[rank] = sums.clone()
            barrier.wait()
            total = sent[0] + sent[1]
            barrier.wait()
            return total

        try:
            results[rank] = function(rank, reduce)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def test_literal_statistics_skip_garbage():
    # Real values 1, 2, 6: mean 3, squares about it 4 + 1 + 9 = 14.
    assert masked_sum(X, MASK).item() == 9.0
    assert masked_mean(X, MASK).item() == 3.0
    assert masked_var(X, MASK).item() == 7.0  # 14 / 2
    assert masked_var(X, MASK, unbiased=False).item() == pytest.approx(14 / 3, abs=1e-15)


def test_whitened_values_by_hand():
    white = masked_whiten(X, MASK, eps=0.0)
    expected = torch.tensor([[-2.0, -1.0, 0.0], [3.0, 0.0, 0.0]], dtype=torch.float64) / 7**0.5
    torch.testing.assert_close(white, expected, atol=1e-15, rtol=0)


def test_shift_mean_false_puts_the_mean_back():
    # Kills the inverted flag: rewards of one sign must not lose their offset.
    white = masked_whiten(X, MASK, shift_mean=False, eps=0.0)
    expected = torch.tensor([3 - 2 / 7**0.5, 3 - 1 / 7**0.5, 3 + 3 / 7**0.5], dtype=torch.float64)
    torch.testing.assert_close(white[MASK], expected, atol=1e-14, rtol=0)
    assert (white[~MASK] == 0).all()


def test_eps_stands_under_the_root():
    white = masked_whiten(X, MASK, eps=2.0)
    assert white[1, 0].item() == pytest.approx(3 / 9**0.5, abs=1e-15)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_constant_values_do_not_explode(shift_mean):
    x = torch.full((3, 7), 0.1, dtype=torch.float32)
    white = masked_whiten(x, torch.ones_like(x, dtype=torch.bool), shift_mean=shift_mean)
    assert (white - (0.0 if shift_mean else 0.1)).abs().max() < 1e-3


def test_empty_mask_gives_zero_never_nan():
    empty = torch.zeros_like(MASK)
    for result in (
        masked_sum(X, empty),
        masked_mean(X, empty),
        masked_var(X, empty),
        masked_var(X, empty, unbiased=False),
        masked_whiten(X, empty),
        masked_whiten(X, empty, shift_mean=False),
        explained_variance(X, X, empty),
    ):
        assert (result == 0).all()


def test_one_token_has_no_variance():
    one = torch.tensor([[False, True, False], [False, False, False]])
    assert masked_var(X, one).item() == 0.0
    assert masked_whiten(X, one)[0, 1].item() == 0.0


def test_large_mean_keeps_the_digits_in_float32():
    # E[x^2] - E[x]^2 gives garbage here: 1e10 has a float32 spacing of 1024.
    x = torch.tensor([100000.0, 100001.0, 100002.0, 100003.0])
    mask = torch.ones(4, dtype=torch.bool)
    assert masked_var(x, mask, unbiased=False).item() == pytest.approx(1.25, rel=1e-6)


def test_bfloat16_counts_past_256():
    x = torch.ones(1000, dtype=torch.bfloat16)
    sent = []
    mean = masked_mean(x, torch.ones(1000, dtype=torch.bool), lambda sums: sent.append(sums) or sums)
    assert all(sums.dtype == torch.float32 for sums in sent)  # what ranks add up has to be exact as well
    assert mean.dtype == torch.bfloat16 and mean.item() == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    x = X.to(dtype)
    for result in (masked_sum(x, MASK), masked_mean(x, MASK), masked_var(x, MASK), masked_whiten(x, MASK)):
        assert result.dtype == dtype
    assert explained_variance(x, x, MASK).dtype == dtype


def test_two_ranks_equal_one_process():
    # Kills: averaging the ranks' own means and variances (the ranks hold 3 and 11 tokens, far apart).
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, dtype=torch.float64, generator=generator) + torch.tensor([[0.0], [5], [50], [3]])
    v = torch.randn(4, 6, dtype=torch.float64, generator=generator) + x
    mask = torch.arange(6) < torch.tensor([[1], [2], [5], [6]])
    x, v = x.masked_fill(~mask, NAN), v.masked_fill(~mask, INF)
    parts = [slice(0, 2), slice(2, 4)]
    real = x[mask]

    def same_on_both(function, expected):
        for got in two_ranks(function):
            torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)

    same_on_both(lambda r, reduce: masked_mean(x[parts[r]], mask[parts[r]], reduce), real.mean())
    same_on_both(lambda r, reduce: masked_var(x[parts[r]], mask[parts[r]], reduce), real.var())
    same_on_both(
        lambda r, reduce: explained_variance(v[parts[r]], x[parts[r]], mask[parts[r]], reduce),
        1 - (real - v[mask]).var() / real.var(),
    )
    white = two_ranks(lambda r, reduce: masked_whiten(x[parts[r]], mask[parts[r]], True, reduce, 0.0))
    expected = (real - real.mean()) / real.std()
    torch.testing.assert_close(torch.cat(white)[mask], expected, atol=1e-12, rtol=0)


def test_a_rank_without_tokens_gets_the_statistics_of_the_other():
    x = [torch.full((2, 2), NAN, dtype=torch.float64), torch.tensor([[1.0, 3.0]], dtype=torch.float64)]
    mask = [torch.zeros(2, 2, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool)]
    means = two_ranks(lambda r, reduce: masked_mean(x[r], mask[r], reduce))
    variances = two_ranks(lambda r, reduce: masked_var(x[r], mask[r], reduce))
    assert [m.item() for m in means] == [2.0, 2.0]
    assert [v.item() for v in variances] == [2.0, 2.0]


def test_explained_variance_by_hand():
    mask = torch.tensor([[True, True, True, True, False]])
    returns = torch.tensor([[1.0, 2.0, 3.0, 4.0, NAN]], dtype=torch.float64)  # squares 5
    perfect = returns.clone()
    offset = returns + 7
    constant = torch.tensor([[2.0, 2, 2, 2, INF]], dtype=torch.float64)
    halfway = returns / 2  # residual R/2: a quarter of the variance
    against = -returns  # residual 2R: four times the variance
    expected = [(perfect, 1.0), (offset, 1.0), (constant, 0.0), (halfway, 0.75), (against, -3.0)]
    for values, wanted in expected:
        assert explained_variance(values, returns, mask).item() == pytest.approx(wanted, abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_explained_variance_of_returns_that_do_not_vary_is_zero(dtype):
    # The float32 mean of equal numbers misses them by a rounding at some of these sizes (1495 times 0.1 is one):
    # the residue must not pass for variance.
    for count in (7, 1421, 1495, 1643):
        for value in (0.1, 0.7, 123.456):
            returns = torch.full((1, count), value, dtype=dtype)
            values = torch.arange(count, dtype=dtype)[None]
            mask = torch.ones(1, count, dtype=torch.bool)
            assert explained_variance(values, returns, mask).item() == 0.0


def test_a_real_nan_is_not_hidden():
    assert masked_mean(X, ~MASK).isnan() and masked_var(X, ~MASK).isnan()
    assert explained_variance(X, X, ~MASK).isnan()


def test_no_gradient_and_no_nan_through_padding():
    x = X.clone().requires_grad_()
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=torch.float64)
    (masked_whiten(x, MASK) * weight).sum().backward()
    assert x.grad.isfinite().all() and (x.grad[~MASK] == 0).all() and (x.grad[MASK] != 0).all()


def test_shapes_that_would_broadcast_and_float_masks_are_refused():
    with pytest.raises(AssertionError, match="differ in shape"):
        zero_outside(torch.ones(2, 1), MASK)
    with pytest.raises(AssertionError, match="bool"):
        zero_outside(torch.ones(2, 3), MASK.float())
