"""The oracle against central differences and against SciPy: it is itself tested."""

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.special import entr, logsumexp, rel_entr, softmax

from . import oracle
from .helpers import assert_close


DIVERGENCES = {
    "forward": oracle.forward_kl,
    "reverse": oracle.reverse_kl,
    "symmetric": oracle.symmetric_kl(0.3),
    "js": oracle.jensen_shannon(0.5),
    "js_normalized": oracle.jensen_shannon(0.1, normalized=True),
    "skew_forward": oracle.skew_forward_kl(0.1),
    "skew_reverse": oracle.skew_reverse_kl(0.2),
    "total_variation": oracle.total_variation,
    "alpha_half": oracle.alpha_divergence(0.5),
    "alpha_two": oracle.alpha_divergence(2.0),
    "alpha_minus_one": oracle.alpha_divergence(-1.0),
    "squared_error": oracle.squared_error,
}
ARGUMENTS = ["student", "teacher", "temperature", "teacher_temperature", "weights"]


@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_closed_form_gradients_match_central_differences(
    rng, divergence, reduction, argument
):
    floats = dict(
        student=rng.normal(size=(2, 3, 5)),
        teacher=rng.normal(size=(2, 3, 6)),
        temperature=rng.uniform(0.5, 2, size=(2, 3)),
        teacher_temperature=rng.uniform(0.5, 2, size=()),
        weights=rng.uniform(0, 2, size=(2, 3)),
    )
    cotangent = rng.normal(size=(2, 3) if reduction == "none" else ())
    rest = dict(
        divergence=divergence,
        labels=np.array([[0, 3, -100], [1, 2, 3]]),
        where=np.array([[True, True, True], [False, True, True]]),
        alpha=0.7,
        label_smoothing=0.1,
        z_loss=0.01,
        vocab_size=4,
        reduction=reduction,
    )

    def loss(x):
        arguments = floats | {argument: x}
        value = oracle.distillation_loss(**arguments, **rest).loss
        return np.sum(value * cotangent)

    grads = oracle.distillation_loss(**floats, **rest, cotangent=cotangent)
    expected = oracle.jacobian(loss, floats[argument])
    assert np.any(expected != 0)
    assert_close(getattr(grads, argument), expected, 1e-9)


def test_shared_temperature_moves_both_models(rng):
    s, t = rng.normal(size=(2, 3, 5))
    f = lambda T: oracle.distillation_loss(s, t, temperature=T).loss
    grad = oracle.distillation_loss(s, t, temperature=1.7).temperature
    assert_close(grad, oracle.jacobian(f, 1.7), 1e-9)


def _value(divergence, s, t):
    return oracle.distillation_loss(s, t, divergence=divergence, reduction="none").loss


def test_divergences_match_scipy(rng):
    s, t = rng.normal(size=(2, 3, 7))
    q, p = softmax(s, -1), softmax(t, -1)
    kl = lambda a, b: rel_entr(a, b).sum(-1)
    mix = lambda a: a * p + (1 - a) * q
    alpha = lambda a: ((p**a * q ** (1 - a)).sum(-1) - 1) / (a * (a - 1))
    js = 0.1 * kl(p, mix(0.1)) + 0.9 * kl(q, mix(0.1))
    expected = {
        "forward": kl(p, q),
        "reverse": kl(q, p),
        "symmetric": 0.3 * kl(p, q) + 0.7 * kl(q, p),
        "js": jensenshannon(p, q, axis=-1) ** 2,
        "js_normalized": js / 0.09,
        "skew_forward": kl(p, mix(0.1)),
        "skew_reverse": kl(q, mix(0.8)),
        "total_variation": np.abs(p - q).sum(-1) / 2,
        "alpha_half": alpha(0.5),
        "alpha_two": alpha(2.0),
        "alpha_minus_one": alpha(-1.0),
        "squared_error": ((p - q) ** 2).sum(-1),
    }
    assert expected.keys() == DIVERGENCES.keys()
    for name, divergence in DIVERGENCES.items():
        assert_close(_value(divergence, s, t), expected[name], 1e-12, name)


@pytest.mark.parametrize(
    "family, ends",
    [
        (lambda b: oracle.jensen_shannon(b, normalized=True), (0, 1)),
        (oracle.alpha_divergence, (1, 0)),
        (oracle.symmetric_kl, (1, 0)),
    ],
    ids=["js_normalized", "alpha", "symmetric"],
)
def test_limits_are_forward_and_reverse_kl(rng, family, ends):
    s, t = rng.normal(size=(2, 3, 7))
    for end, kl in zip(ends, (oracle.forward_kl, oracle.reverse_kl), strict=True):
        near = end + 1e-6 * (1 if end == 0 else -1)
        assert_close(_value(family(end), s, t), _value(kl, s, t), 1e-15)
        assert_close(_value(family(near), s, t), _value(kl, s, t), 1e-5)


def test_metrics_match_scipy(rng):
    s, t = rng.normal(size=(2, 6, 5))
    q, p = softmax(s, -1), softmax(t, -1)
    labels = np.array([0, 1, -100, 3, 4, 0])
    w = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    got = oracle.metrics(s, t, labels=labels, weights=w, temperature=2.0)
    mean = lambda x: np.sum(w * x) / w.sum()
    nll = logsumexp(s, -1) - s[np.arange(6), np.maximum(labels, 0)]
    assert_close(got.kl, mean(rel_entr(p, q).sum(-1)), 1e-12)
    assert_close(got.student_entropy, mean(entr(q).sum(-1)), 1e-12)
    assert_close(got.teacher_entropy, mean(entr(p).sum(-1)), 1e-12)
    assert_close(got.top1_agreement, mean(s.argmax(-1) == t.argmax(-1)), 1e-12)
    assert_close(got.cross_entropy, (w * nll)[labels >= 0].sum() / 18, 1e-12)
    assert got.weight == 21
    assert got.divergence < got.kl  # temperature 2 flattens both
