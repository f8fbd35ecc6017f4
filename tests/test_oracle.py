"""The oracle agrees with central differences, with SciPy and with decimals."""

from decimal import Decimal, localcontext

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.special import entr, logsumexp, rel_entr, softmax

import jaxkl

from . import oracle
from .cases import rarely
from .helpers import assert_close
from .sources import make_list, TAILS


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


@pytest.mark.parametrize("number", range(len(DIVERGENCES)), ids=DIVERGENCES)
def test_closed_form_gradients_match_central_differences(rng, number):
    divergence = list(DIVERGENCES.values())[number]
    reduction = ("none", "sum", "mean")[number % 3]  # whatever the divergence is
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
    grads = oracle.distillation_loss(**floats, **rest, cotangent=cotangent)
    for argument in floats:

        def loss(x):
            arguments = floats | {argument: x}  # noqa: B023
            value = oracle.distillation_loss(**arguments, **rest).loss
            return np.sum(value * cotangent)

        expected = oracle.jacobian(loss, floats[argument])
        assert np.any(expected != 0)
        assert_close(getattr(grads, argument), expected, 1e-9, argument)


@pytest.mark.parametrize("argument", ["student", "temperature", "weights"])
@pytest.mark.parametrize("tail", TAILS)
def test_gradients_beside_a_list_match_central_differences(rng, tail, argument):
    floats = dict(
        student=rng.normal(size=(3, 9)),
        temperature=rng.uniform(0.5, 2, size=3),
        weights=rng.uniform(0, 2, size=3),
    )
    teacher = make_list(rng, (3,), 9, 5, tail)
    divergence = oracle.forward_kl if tail == "drop" else oracle.jensen_shannon(0.3)
    loss = lambda **floats: oracle.distillation_loss(
        teacher=teacher, divergence=divergence, **floats
    )
    expected = oracle.jacobian(
        lambda x: loss(**floats | {argument: x}).loss, floats[argument]
    )
    assert np.any(expected != 0)
    assert_close(getattr(loss(**floats), argument), expected, 1e-9)


@pytest.mark.parametrize("argument", ["student", "temperature"])
def test_log_probs_match_scipy_and_central_differences(rng, argument):
    floats = dict(
        student=rng.normal(size=(2, 3, 6)), temperature=rng.uniform(1, 2, (2, 3))
    )
    tokens = np.array([[[0, 3], [-1, 2], [1, 1]], [[2, 3], [9, 9], [0, -1]]])
    where = np.array([[True, True, True], [True, False, True]])
    g = rng.normal(size=(2, 3, 2)), rng.normal(size=(2, 3))
    of = lambda floats: oracle.token_log_probs(
        **floats, tokens=tokens, where=where, vocab_size=5, cotangents=g
    )
    result = of(floats)
    q = softmax(floats["student"][..., :5] / floats["temperature"][..., None], -1)
    assert_close(result.entropy, np.where(where, entr(q).sum(-1), 0), 1e-12)
    assert_close(result.log_probs[0, 0], np.log(q[0, 0, [0, 3]]), 1e-12)
    assert result.log_probs[0, 1, 0] == 0 and not result.log_probs[1, 1].any()

    def total(x):
        found = of(floats | {argument: x})
        return np.sum(found.log_probs * g[0]) + np.sum(found.entropy * g[1])

    assert_close(
        getattr(result, argument), oracle.jacobian(total, floats[argument]), 1e-8
    )


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


def test_metrics_of_a_list_by_hand():
    q = np.array([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25], [0.5, 0.3, 0.1, 0.1]])
    indices = np.array([[1, 2, -1], [3, 3, 0], [-1, -1, -1]])
    log_probs = np.log([[0.6, 0.1, 0.9], [0.2, 0.1, 0.3], [0.5, 0.5, 0.5]])
    teacher = jaxkl.SparseTeacher(indices, log_probs, tail="bucket")
    got = oracle.metrics(np.log(q), teacher, weights=[1.0, 1, 2])
    # Column 2 is not among the two largest; of equal columns all are; nothing is.
    assert_close(got.top_k_overlap, (0.5 + 1 + 2 * 0) / 4, 1e-12)
    assert_close(got.teacher_listed_mass, (0.7 + 0.6 + 2 * 0) / 4, 1e-12)
    assert_close(got.student_listed_mass, (0.6 + 0.5 + 2 * 0) / 4, 1e-12)
    dense = oracle.metrics(np.log(q), np.log(q))
    assert dense.top_k_overlap is None and dense.student_listed_mass is None


# Rows where a textbook sum loses its digits, against a sum in a hundred digits.

HARD = {
    # student, teacher, temperature
    "confident": ([20, 1, 0], [20, 0, 0.5], 1.0),
    "confident student": ([14, 0, 0.3], [-60, 0, 0.1], 1.0),
    "confident teacher": ([-60, 0, 0.1], [14, 0, 0.3], 1.0),
    "apart": ([0, -60, 3], [0, 2, 1], 1.0),
    "near": ([0.3, 1, -2], [0.3, 1.00001, -2], 1.0),
    "T = 1e4": (np.linspace(-2, 1, 9) ** 3, np.linspace(0, 2, 9) ** 2, 1e4),
    "T = 1e6": (np.linspace(-2, 1, 9) ** 3, np.linspace(0, 2, 9) ** 2, 1e6),
}
_kl = lambda p, q: sum(a * (a / b).ln() for a, b in zip(p, q, strict=True))
_mix = lambda a, p, q: [a * x + (1 - a) * y for x, y in zip(p, q, strict=True)]
_mixed = lambda b, p, q: (
    b * _kl(p, _mix(b, p, q)) + (1 - b) * _kl(q, _mix(b, p, q)),
    b * (1 - b),
)
_power = lambda a, p, q: sum(x**a * y ** (1 - a) for x, y in zip(p, q, strict=True)) - 1
# Each family of oracles beside the textbook formula.
FAMILIES = {
    "symmetric": (
        oracle.symmetric_kl,
        lambda w, p, q: w * _kl(p, q) + (1 - w) * _kl(q, p),
    ),
    "js": (oracle.jensen_shannon, lambda b, p, q: _mixed(b, p, q)[0]),
    "js_normalized": (
        lambda b: oracle.jensen_shannon(b, normalized=True),
        lambda b, p, q: _mixed(b, p, q)[0] / _mixed(b, p, q)[1],
    ),
    "skew_forward": (oracle.skew_forward_kl, lambda a, p, q: _kl(p, _mix(a, p, q))),
    "skew_reverse": (oracle.skew_reverse_kl, lambda a, p, q: _kl(q, _mix(a, q, p))),
    "total_variation": (
        lambda _: oracle.total_variation,
        lambda _, p, q: sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2,
    ),
    "alpha": (oracle.alpha_divergence, lambda a, p, q: _power(a, p, q) / (a * (a - 1))),
}
PARAMETERS = {"total_variation": [0.0], "alpha": [-1.0, 1e-8, 0.5, 1 - 1e-8, 2.0]}


def _decimals(x):
    return [Decimal(float(v)) for v in x]


def _softmax(logits):
    powers = [x.exp() for x in logits]
    return [x / sum(powers) for x in powers]


def _slopes(f, x, step=Decimal("1e-35")):
    """Central differences with the digits of the decimal context."""
    moved = lambda i, h: f([v + h * (i == j) for j, v in enumerate(x)])
    return [(moved(i, step) - moved(i, -step)) / (2 * step) for i in range(len(x))]


def _assert_digits(actual, expected, rounding=0.0):
    assert_close(actual, [float(x) for x in expected], 1e-12, floor=rounding)


@pytest.mark.parametrize(
    "row",
    ["confident", "near", "T = 1e6"]
    + rarely("confident student", "confident teacher", "apart", "T = 1e4"),
)
@pytest.mark.parametrize("family", FAMILIES)
def test_digits_of_hard_rows(family, row):
    make, textbook = FAMILIES[family]
    student, teacher, temperature = HARD[row]
    s, t, T = _decimals(student), _decimals(teacher), Decimal(temperature)
    for parameter in PARAMETERS.get(family, [1e-8, 0.3, 1 - 1e-8]):

        def loss(s, t):
            p, q = (_softmax([x / T for x in z]) for z in (t, s))
            return T * T * textbook(Decimal(parameter), p, q)  # noqa: B023

        with localcontext(prec=100):
            value = loss(s, t)
            d_student = _slopes(lambda z: loss(z, t), s)
            d_teacher = _slopes(lambda z: loss(s, z), t)
        got = oracle.distillation_loss(
            *np.float64([[student], [teacher]]),
            divergence=make(parameter),
            temperature=temperature,
        )
        # Rounding leaves slopes of 1e-18 of the loss.
        rounding = 1e-19 * float(value)
        _assert_digits([got.loss], [value])
        _assert_digits(got.student[0], d_student, rounding)
        _assert_digits(got.teacher[0], d_teacher, rounding)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_digits_of_a_confident_cross_entropy(smoothing):
    row = [0, -14.5, -15.2, -30]
    got = oracle.distillation_loss(
        *np.float64([[row], [row]]),
        labels=np.array([0]),
        alpha=0.0,
        label_smoothing=smoothing,
    )

    def loss(logits):
        losses = [-x.ln() for x in _softmax(logits)]
        epsilon = Decimal(smoothing)
        return (1 - epsilon) * losses[0] + epsilon * sum(losses) / len(losses)

    with localcontext(prec=100):
        value, slopes = loss(_decimals(row)), _slopes(loss, _decimals(row))
    _assert_digits([got.loss], [value])
    _assert_digits(got.student[0], slopes)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_models_differ_by_exactly_nothing(rng, family):
    rows = np.concatenate([rng.normal(size=(3, 9)), [[-np.inf] * 8 + [3.0]]])
    for parameter in PARAMETERS.get(family, [1e-8, 0.1, 0.3, 1 - 1e-8]):
        divergence = FAMILIES[family][0](parameter)
        got = oracle.distillation_loss(rows, rows, divergence=divergence)
        assert got.loss == 0
        assert not got.student.any() and not got.teacher.any()
