"""Token rewards by hand."""

import torch

from mmft.algorithms.rewards import apply_missing_eos_penalty, potential_shaping, token_rewards

NAN, INF = float("nan"), float("inf")


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


MASK = torch.tensor([[True, True, True], [True, True, False], [True, False, False], [False, False, False]])
KL = tensor([1.0, 2.0, 3.0], [4.0, -5.0, NAN], [6.0, INF, -INF], [NAN, NAN, NAN])
SCORES = torch.tensor([10.0, 20.0, 30.0, 40.0], dtype=torch.float64)


def test_score_falls_on_the_last_real_token():
    # Kills: score on the last column; a sign of the KL; a score for a response that has no token.
    expected = tensor([-0.5, -1.0, 8.5], [-2.0, 22.5, 0.0], [27.0, 0.0, 0.0], [0.0, 0.0, 0.0])
    torch.testing.assert_close(token_rewards(SCORES, KL, MASK, 0.5), expected, atol=0, rtol=0)


def test_shaping_is_added_everywhere_real():
    shaping = tensor([0.25, 0.5, 1.0], [0.25, 0.5, NAN], [0.25, NAN, NAN], [NAN, NAN, NAN])
    expected = tensor([-0.25, -0.5, 9.5], [-1.75, 23.0, 0.0], [27.25, 0.0, 0.0], [0.0, 0.0, 0.0])
    torch.testing.assert_close(token_rewards(SCORES, KL, MASK, 0.5, shaping), expected, atol=0, rtol=0)


def test_without_kl_the_rewards_of_a_response_sum_to_its_score():
    total = token_rewards(SCORES, KL, MASK, 0.0).sum(-1)
    assert total.tolist() == [10.0, 20.0, 30.0, 0.0]


def test_score_of_an_empty_response_is_not_read():
    scores = SCORES.clone()
    scores[3] = NAN
    assert token_rewards(scores, KL, MASK, 0.5).isfinite().all()


def test_a_masked_token_inside_is_skipped():
    mask = torch.tensor([[True, False, True, False, False]])
    rewards = token_rewards(torch.tensor([5.0], dtype=torch.float64), tensor([1.0, NAN, 2.0, NAN, NAN]), mask, 1.0)
    assert rewards.tolist() == [[-1.0, 0.0, 3.0, 0.0, 0.0]]


def test_missing_eos_penalty_hits_the_cut_off_responses_only():
    scores = torch.tensor([1.0, 2.0, NAN], dtype=torch.float64)
    got = apply_missing_eos_penalty(scores, torch.tensor([True, False, True]), 0.5)
    assert got[:2].tolist() == [1.0, 1.5] and got[2].isnan()
    assert scores[1] == 2.0  # the caller's scores are left alone


def test_potential_shaping_by_hand():
    # Kills: gamma left out, the end's potential kept, the potential before instead of after a token.
    phi = tensor([1.0, 3.0, 7.0], [2.0, 5.0, NAN], [4.0, INF, NAN], [NAN, NAN, NAN])
    expected = tensor([0.5, 0.5, -3.0], [1.0, -2.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0])
    torch.testing.assert_close(potential_shaping(phi, MASK, 0.5), expected, atol=0, rtol=0)


def test_shaping_leaves_the_return_from_the_start_alone():
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(50, 9, generator=generator, dtype=torch.float64)
    mask = torch.rand(50, 9, generator=generator) < 0.7
    for gamma in (1.0, 0.9, 0.3):
        shaped = potential_shaping(phi, mask, gamma)
        for row, real in zip(shaped, mask, strict=True):
            tokens = row[real]
            assert abs(sum(gamma**t * f for t, f in enumerate(tokens.tolist()))) < 1e-12


def test_score_plus_shaping_is_the_increment_of_the_score_when_undiscounted():
    # Phi = the score of the prefix; the last prefix is the whole response.
    phi = tensor([1.0, 3.0, 10.0], [2.0, 20.0, NAN], [30.0, NAN, NAN], [NAN, NAN, NAN])
    shaped = token_rewards(SCORES, torch.zeros_like(KL), MASK, 0.0, potential_shaping(phi, MASK, 1.0))
    increments = tensor([1.0, 2.0, 7.0], [2.0, 18.0, 0.0], [30.0, 0.0, 0.0], [0.0, 0.0, 0.0])
    torch.testing.assert_close(shaped, increments, atol=0, rtol=0)
