"""Each figure against its definition over the whole vocabulary, in float64 and written out with numpy."""

import numpy as np
import pytest
import torch

from sparsekd.trainer.quality import metrics

POSITIONS, VOCABULARY, HEAD, DRAWS = 40, 37, 5, 12


def _distributions(seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(2, POSITIONS, VOCABULARY)) * 2.0
    powers = np.exp(logits)
    p, q = powers / powers.sum(-1, keepdims=True)
    return p, q


def _log(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.log(values)).float()


def _head(p: np.ndarray, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = np.argsort(-p, axis=-1)[:, :k]
    kept = np.take_along_axis(p, ids, -1)
    rest = np.stack([np.delete(row, chosen).sum() for row, chosen in zip(p, ids, strict=True)])
    with np.errstate(divide="ignore"):
        log_rest = torch.from_numpy(np.log(rest)).float()
    return torch.from_numpy(ids), _log(kept), log_rest


def test_own_scores() -> None:
    _, q = _distributions(0)
    labels = np.random.default_rng(1).integers(0, VOCABULARY, POSITIONS)
    scores = metrics.own_scores(_log(q), torch.from_numpy(labels))
    np.testing.assert_allclose(scores.loss, -np.log(q[np.arange(POSITIONS), labels]), rtol=1e-5)
    np.testing.assert_array_equal(scores.top_ids, q.argmax(-1))
    np.testing.assert_allclose(scores.confidence, q.max(-1), rtol=1e-5)
    np.testing.assert_array_equal(scores.hit, q.argmax(-1) == labels)
    np.testing.assert_allclose(scores.entropy, -(q * np.log(q)).sum(-1), rtol=1e-5)


def test_dense_figures() -> None:
    p, q = _distributions(2)
    kl, acceptance = (p * np.log(p / q)).sum(-1), np.minimum(p, q).sum(-1)
    np.testing.assert_allclose(metrics.dense_kl(_log(p), _log(q)), kl, rtol=1e-5)
    np.testing.assert_allclose(metrics.dense_acceptance(_log(p), _log(q)), acceptance, rtol=1e-5)


@pytest.mark.parametrize("k", [1, HEAD, VOCABULARY])
def test_buckets_are_what_they_say_and_bound_the_truth(k: int) -> None:
    p, q = _distributions(3)
    ids, head_logprobs, log_rest = _head(p, k)
    chosen = np.take_along_axis(q, ids.numpy(), -1)
    kept = np.take_along_axis(p, ids.numpy(), -1)
    rest_p, rest_q = p.sum(-1) - kept.sum(-1), q.sum(-1) - chosen.sum(-1)
    kl = (kept * np.log(kept / chosen)).sum(-1)
    acceptance = np.minimum(kept, chosen).sum(-1)
    if k < VOCABULARY:
        kl = kl + rest_p * np.log(rest_p / rest_q)
        acceptance = acceptance + np.minimum(rest_p, rest_q)
    found_kl = metrics.bucket_kl(_log(q), ids, head_logprobs, log_rest).numpy()
    found_acceptance = metrics.bucket_acceptance(_log(q), ids, head_logprobs, log_rest).numpy()
    np.testing.assert_allclose(found_kl, kl, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found_acceptance, acceptance, rtol=1e-5)
    true_kl, true_acceptance = (p * np.log(p / q)).sum(-1), np.minimum(p, q).sum(-1)
    assert (found_kl <= true_kl + 1e-5).all()
    assert (found_acceptance >= true_acceptance - 1e-5).all()
    if k == VOCABULARY:
        np.testing.assert_allclose(found_kl, true_kl, rtol=1e-4)
    else:
        # Bounds, not the figures themselves: a test that could not tell them apart would prove nothing.
        assert (true_kl - found_kl).max() > 1e-3
        assert (found_acceptance - true_acceptance).max() > 1e-3


@pytest.mark.parametrize("k", [0, HEAD])
def test_sampled_kl_is_unbiased(k: int) -> None:
    """With the rest's own probabilities as counts the estimate is the truth; with real draws its mean is."""
    p, q = _distributions(4)
    ids, head_logprobs, log_rest = _head(p, k)
    rest = p.copy()
    np.put_along_axis(rest, ids.numpy(), 0.0, -1)
    rest /= rest.sum(-1, keepdims=True)
    entropy = torch.from_numpy(-(p * np.log(p)).sum(-1)).float()
    everyone = torch.arange(VOCABULARY).expand(POSITIONS, -1)
    truth = (p * np.log(p / q)).sum(-1)

    exact = metrics.sampled_kl(
        _log(q), ids, head_logprobs, everyone, torch.from_numpy(rest * DRAWS).float(), log_rest, entropy
    )
    np.testing.assert_allclose(exact, truth, rtol=1e-4, atol=1e-5)

    generator = np.random.default_rng(5)
    repeats = 400
    estimates = []
    for _ in range(repeats):
        counts = np.stack([generator.multinomial(DRAWS, row) for row in rest])
        padded = torch.from_numpy(np.where(counts > 0, np.arange(VOCABULARY), -1))
        counted = torch.from_numpy(counts).float()
        estimates.append(
            metrics.sampled_kl(_log(q), ids, head_logprobs, padded, counted, log_rest, entropy).mean().item()
        )
    error = np.std(estimates) / np.sqrt(repeats)
    assert abs(np.mean(estimates) - truth.mean()) < 4 * error


def test_an_empty_rest_is_no_nan() -> None:
    p, q = _distributions(6)
    ids, head_logprobs, _ = _head(p, VOCABULARY)
    empty = torch.full((POSITIONS,), -torch.inf)
    nothing = torch.full((POSITIONS, DRAWS), -1)
    entropy = torch.from_numpy(-(p * np.log(p)).sum(-1)).float()
    truth = (p * np.log(p / q)).sum(-1)
    sampled = metrics.sampled_kl(
        _log(q), ids, head_logprobs, nothing, torch.zeros(POSITIONS, DRAWS), empty, entropy
    )
    np.testing.assert_allclose(sampled, truth, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics.bucket_kl(_log(q), ids, head_logprobs, empty), truth, rtol=1e-4)
    acceptance = metrics.bucket_acceptance(_log(q), ids, head_logprobs, empty)
    np.testing.assert_allclose(acceptance, np.minimum(p, q).sum(-1), rtol=1e-5)


@pytest.mark.parametrize("k", [1, HEAD, VOCABULARY])
def test_probability_zero_is_no_nan(k: int) -> None:
    """Where teacher and model both rule ids out, by a mask or by float32's end, they add nothing."""
    p, q = _distributions(7)
    ids, _, _ = _head(p, HEAD)
    never = np.array([np.setdiff1d(np.arange(VOCABULARY), row)[:3] for row in ids.numpy()])
    for values in (p, q):
        np.put_along_axis(values, never, 0.0, -1)
        values /= values.sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_p, log_q = _log(p), _log(q)
        entropy = -np.nan_to_num(q * np.log(q)).sum(-1)
        truth = np.nan_to_num(p * np.log(p / q)).sum(-1)
        ids, head_logprobs, log_rest = _head(p, k)
    scores = metrics.own_scores(log_q, torch.zeros(POSITIONS, dtype=torch.int64))
    np.testing.assert_allclose(scores.entropy, entropy, rtol=1e-5)
    np.testing.assert_allclose(metrics.dense_kl(log_p, log_q), truth, rtol=1e-4, atol=1e-6)
    bucket = metrics.bucket_kl(log_q, ids, head_logprobs, log_rest).numpy()
    assert np.isfinite(bucket).all() and (bucket <= truth + 1e-5).all()
    everyone = torch.arange(VOCABULARY).expand(POSITIONS, -1)
    rest = p.copy()
    np.put_along_axis(rest, ids.numpy(), 0.0, -1)
    teacher_entropy = torch.from_numpy(-np.nan_to_num(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)).float()
    sampled = metrics.sampled_kl(
        log_q, ids, head_logprobs, everyone, torch.from_numpy(rest).float() * 1e4, log_rest, teacher_entropy
    )
    np.testing.assert_allclose(sampled, truth, rtol=1e-4, atol=1e-5)
