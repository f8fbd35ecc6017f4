"""Bad input: each error names its argument, and nothing passes silently."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkl
import jaxkl.reference

from .cases import rarely, rounded


S = np.zeros((3, 5), np.float32)
LABELS = np.zeros(3, int)
INT_LOGITS = np.zeros((3, 5), int)

VALUE_ERRORS = {
    "0-d student": ("student", dict(student=np.float32(0))),
    "0-d teacher": ("teacher", dict(teacher=np.float32(0))),
    "token shapes differ": ("teacher", dict(teacher=np.zeros((4, 5), np.float32))),
    "teacher of one token": ("teacher", dict(teacher=np.zeros((1, 5), np.float32))),
    "teacher without tokens": ("teacher", dict(teacher=np.zeros(5, np.float32))),
    "teacher of more axes": ("teacher", dict(teacher=np.zeros((1, 3, 5), np.float32))),
    "wider teacher": ("vocab_size", dict(teacher=np.zeros((3, 6), np.float32))),
    "wider student": ("vocab_size", dict(student=np.zeros((3, 6), np.float32))),
    "vocab_size above both": ("vocab_size", dict(vocab_size=6)),
    "vocab_size above one": (
        "vocab_size",
        dict(teacher=np.zeros((3, 4), np.float32), vocab_size=5),
    ),
    "vocab_size of 0": ("vocab_size", dict(vocab_size=0)),
    "no vocabulary": (
        "student",
        dict(
            student=np.zeros((3, 0), np.float32), teacher=np.zeros((3, 0), np.float32)
        ),
    ),
    "reduction": ("reduction", dict(reduction="average")),
    "batchmean": ("reduction", dict(reduction="batchmean")),
    "reduction=None": ("reduction", dict(reduction=None)),
    "temperature of 0": ("temperature", dict(temperature=0.0)),
    "negative temperature": ("temperature", dict(temperature=-1)),
    "temperature of nan": ("temperature", dict(temperature=float("nan"))),
    "temperature of inf": ("temperature", dict(temperature=float("inf"))),
    "temperature too high": ("temperature", dict(temperature=2e6)),
    "one temperature too low": (
        "temperature",
        dict(temperature=np.float32([1, 1e-7, 1])),
    ),
    "one temperature of 0": ("temperature", dict(temperature=np.float32([1, 0, 1]))),
    "temperature shape": ("temperature", dict(temperature=np.ones(4, np.float32))),
    "temperature per column": (
        "temperature",
        dict(temperature=np.ones((3, 1), np.float32)),
    ),
    "temperature of one": ("temperature", dict(temperature=np.ones(1, np.float32))),
    "teacher_temperature of 0": ("teacher_temperature", dict(teacher_temperature=0.0)),
    "teacher_temperature too low": (
        "teacher_temperature",
        dict(teacher_temperature=1e-14),
    ),
    "teacher_temperature shape": (
        "teacher_temperature",
        dict(teacher_temperature=np.ones((3, 5), np.float32)),
    ),
    "alpha below 0": ("alpha", dict(alpha=-0.1, labels=LABELS)),
    "alpha above 1": ("alpha", dict(alpha=1.1, labels=LABELS)),
    "alpha of nan": ("alpha", dict(alpha=float("nan"), labels=LABELS)),
    "alpha without labels": ("labels", dict(alpha=0.5)),
    "labels shape": ("labels", dict(alpha=0.5, labels=np.zeros(4, int))),
    "labels as one-hot": ("labels", dict(alpha=0.5, labels=np.zeros((3, 5), int))),
    "label too large": ("labels", dict(alpha=0.5, labels=np.array([0, 5, 1]))),
    "label of -1": ("labels", dict(alpha=0.5, labels=np.array([0, -1, 1]))),
    "label in the padding": (
        "labels",
        dict(alpha=0.5, labels=np.array([0, 4, 1]), vocab_size=4),
    ),
    "labels that wrap to 1": (
        "labels",
        dict(alpha=0.5, labels=np.array([0, 2**32 + 1, 1])),
    ),
    "labels that wrap to -100": (
        "labels",
        dict(alpha=0.5, labels=np.array([0, 2**32 - 100, 1], np.uint32)),
    ),
    "uint64 labels that wrap to 1": (
        "labels",
        dict(alpha=0.5, labels=np.array([0, 2**32 + 1, 1], np.uint64)),
    ),
    "labels that wrap to 1, a list": (
        "labels",
        dict(alpha=0.5, labels=[0, 2**32 + 1, 1]),
    ),
    "negative label_smoothing": (
        "label_smoothing",
        dict(label_smoothing=-0.1, labels=LABELS, alpha=0.5),
    ),
    "label_smoothing above 1": (
        "label_smoothing",
        dict(label_smoothing=1.5, labels=LABELS, alpha=0.5),
    ),
    "negative z_loss": ("z_loss", dict(z_loss=-1e-4)),
    "z_loss of nan": ("z_loss", dict(z_loss=float("nan"))),
    "where shape": ("where", dict(where=np.ones(4, bool))),
    "where over columns": ("where", dict(where=np.ones((3, 5), bool))),
    "0-d where": ("where", dict(where=np.bool_(True))),
    "weights shape": ("weights", dict(weights=np.ones(4, np.float32))),
    "weights over columns": ("weights", dict(weights=np.ones((3, 5), np.float32))),
    "normalizer of a sum": ("normalizer", dict(normalizer=3.0, reduction="sum")),
    "normalizer of none": ("normalizer", dict(normalizer=3.0, reduction="none")),
    "normalizer of 0": ("normalizer", dict(normalizer=0.0)),
    "negative normalizer": ("normalizer", dict(normalizer=-3)),
    "normalizer of nan": ("normalizer", dict(normalizer=float("nan"))),
    "integer normalizer of 0": ("normalizer", dict(normalizer=np.int32(0))),
    "normalizer per token": ("normalizer", dict(normalizer=np.ones(3, np.float32))),
    "tile of 0": ("tile", dict(tile=0)),
    "negative tile": ("tile", dict(tile=-4)),
    "callable of the wrong shape": (
        "divergence",
        dict(divergence=lambda log_p, log_q: jnp.sum(log_p - log_q, -1)),
    ),
}
TYPE_ERRORS = {
    "integer student": ("student", dict(student=INT_LOGITS)),
    "integer teacher": ("teacher", dict(teacher=INT_LOGITS)),
    "boolean student": ("student", dict(student=INT_LOGITS.astype(bool))),
    "complex student": ("student", dict(student=S.astype(np.complex64))),
    "float labels": ("labels", dict(alpha=0.5, labels=np.zeros(3, np.float32))),
    "boolean labels": ("labels", dict(alpha=0.5, labels=np.zeros(3, bool))),
    "labels as text": ("labels", dict(alpha=0.5, labels="yes")),
    "labels with a gap": ("labels", dict(alpha=0.5, labels=[0, None, 1])),
    "where as text": ("where", dict(where="all")),
    "where with a gap": ("where", dict(where=[True, None, True])),
    "weights as text": ("weights", dict(weights="all")),
    "student as text": ("student", dict(student="gpt2")),
    "teacher as text": ("teacher", dict(teacher="gpt2")),
    "temperature as text": ("temperature", dict(temperature="2")),
    "alpha as text": ("alpha", dict(alpha="0.5", labels=LABELS)),
    "normalizer as text": ("normalizer", dict(normalizer="3")),
    "indices as text": (
        "teacher.indices",
        dict(teacher=jaxkl.SparseTeacher("top", S[:, :2])),
    ),
    "float where": ("where", dict(where=np.ones(3, np.float32))),
    "integer where": ("where", dict(where=np.ones(3, int))),
    "integer weights": ("weights", dict(weights=np.ones(3, int))),
    "boolean weights": ("weights", dict(weights=np.ones(3, bool))),
    "tile of 2.5": ("tile", dict(tile=2.5)),
    "vocab_size of 2.5": ("vocab_size", dict(vocab_size=2.5)),
    "divergence by name": ("divergence", dict(divergence="forward_kl")),
    "divergence=None": ("divergence", dict(divergence=None)),
    "a class": ("divergence", dict(divergence=jaxkl.ForwardKL)),
    "a class with parameters": ("divergence", dict(divergence=jaxkl.JensenShannon)),
}
HIDDEN, KERNEL = np.ones((3, 4), np.float32), np.ones((4, 5), np.float32)


class Module:
    """As a layer of Flax or Equinox."""

    kernel = KERNEL

    def __call__(self, x):
        return x @ self.kernel


class Output:
    """As what a model of Hugging Face returns."""

    logits = S


def _head(apply, params):
    return jaxkl.FunctionHead(apply, params, HIDDEN)


AS_HIDDEN = "`student.apply` makes as many columns as its hidden states have, 4"
WAYS_OUT = {  # the arguments, the type of the error, and what it says
    "a module": (
        dict(student=Module()),
        TypeError,
        r"`student` .*got Module, which can be called: .*FunctionHead\(apply, params",
    ),
    "a module as teacher": (
        dict(teacher=Module()),
        TypeError,
        r"`teacher` .*LinearHead\(hidden, kernel\)",
    ),
    "a module as kernel": (
        dict(student=jaxkl.LinearHead(HIDDEN, Module())),
        TypeError,
        "`student.kernel` .*got Module, which can be called: pass its array",
    ),
    "a model's output": (
        dict(student=Output()),
        TypeError,
        "`student` .*Output: pass its `logits`",
    ),
    "a tuple": (
        dict(student=(HIDDEN, KERNEL)),
        TypeError,
        r"`student` .*got a tuple of 2: .*LinearHead\(hidden, kernel\)\.",
    ),
    "teachers": (
        dict(teacher=[S, S]),
        TypeError,
        "`teacher` .*got a list of 2: .*several teachers, add up the loss to each",
    ),
    "heads of teachers": (
        dict(teacher=[jaxkl.LinearHead(HIDDEN, KERNEL)]),
        TypeError,
        "`teacher` .*got a list of 1: ",
    ),
    "apply(hidden, params)": (
        dict(student=_head(lambda x, params: x @ params["kernel"], {"kernel": KERNEL})),
        ValueError,
        "`student.apply` must be .*Swap its arguments",
    ),
    "hidden states": (
        dict(student=_head(lambda scale, x: scale * x, np.float32(2))),
        ValueError,
        AS_HIDDEN,
    ),
    "hidden states and vocab_size": (
        dict(student=_head(lambda scale, x: scale * x, np.float32(2)), vocab_size=5),
        ValueError,
        AS_HIDDEN,
    ),
}
FUNCTIONS = (
    jaxkl.distillation_loss,
    jaxkl.distillation_loss_with_metrics,
    jaxkl.reference.distillation_loss,
)


def _call(loss, arguments):
    arguments = dict(student=S, teacher=S) | arguments
    return loss(arguments.pop("student"), arguments.pop("teacher"), **arguments)


@pytest.mark.parametrize("name, arguments", VALUE_ERRORS.values(), ids=VALUE_ERRORS)
def test_value_errors_name_the_argument(name, arguments):
    with pytest.raises(ValueError, match=f"`{name}`"):
        _call(jaxkl.distillation_loss, arguments)


@pytest.mark.parametrize("name, arguments", TYPE_ERRORS.values(), ids=TYPE_ERRORS)
def test_type_errors_name_the_argument(name, arguments):
    with pytest.raises(TypeError, match=f"`{name}`"):
        _call(jaxkl.distillation_loss, arguments)


@pytest.mark.parametrize("loss", FUNCTIONS[1:])
def test_the_other_functions_have_the_same_checks(loss):
    for error, cases in ((ValueError, VALUE_ERRORS), (TypeError, TYPE_ERRORS)):
        for name, arguments in cases.values():
            with pytest.raises(error, match=f"`{name}`"):
                _call(loss, arguments)


@pytest.mark.parametrize("arguments, error, says", WAYS_OUT.values(), ids=WAYS_OUT)
def test_errors_name_the_way_out(arguments, error, says):
    with pytest.raises(error, match=says):
        _call(jaxkl.distillation_loss, arguments)


def test_an_apply_that_fails_is_named():
    """The error is the user's own, with a note."""
    head = _head(lambda params, x: x @ params["kernal"], {"kernel": KERNEL})
    with pytest.raises(KeyError, match="kernal") as caught:
        jaxkl.distillation_loss(head, S)
    (note,) = [x for x in caught.value.__notes__ if "apply" in x]
    assert "`student.apply` was called as apply(params, hidden)" in note
    assert "float32[2, 4]" in note


@pytest.mark.parametrize(
    "logits, says",
    [
        (Module(), "`logits_or_head` .*got Module, which can be called"),
        (jaxkl.SparseTeacher(LABELS, S[:, 0]), "`logits_or_head` .*got SparseTeacher"),
        ((HIDDEN, KERNEL), "`logits_or_head` .*got a tuple of 2"),
    ],
)
def test_lists_are_made_of_logits(logits, says):
    with pytest.raises(TypeError, match=says):
        jaxkl.top_k_teacher(logits, 2)


def test_a_list_of_numbers_is_an_array():
    numbers = [[1.0, 2.0]], ([np.float32(1), np.float32(2)],)
    assert jaxkl.distillation_loss(*numbers) == 0


@pytest.mark.parametrize("loss", [FUNCTIONS[0], *rarely(*FUNCTIONS[1:])])
def test_the_correct_call_beside_the_errors(loss):
    # So that the errors above come from the one argument that is wrong.
    arguments = dict(
        student=np.zeros((3, 6), np.float32),
        temperature=np.ones(3, np.float32),
        teacher_temperature=1.0,
        alpha=0.5,
        labels=np.array([0, -100, 4]),
        label_smoothing=1.0,
        z_loss=0.0,
        where=np.ones(3, bool),
        weights=np.ones(3, np.float32),
        normalizer=3,
        vocab_size=5,
        tile=2,
    )
    assert np.isfinite(jax.tree.leaves(_call(loss, arguments))[0])


@pytest.mark.parametrize("loss", [FUNCTIONS[0], FUNCTIONS[2]])
def test_labels_want_an_alpha(loss):
    with pytest.raises(ValueError, match="`alpha` must be given with `labels`"):
        loss(S, S, labels=LABELS)
    assert loss(S, S, labels=LABELS, alpha=1.0) == 0


def test_labels_are_for_the_metrics_without_an_alpha():
    loss, metrics = jaxkl.distillation_loss_with_metrics(S, S, labels=LABELS)
    assert loss == 0
    np.testing.assert_allclose(metrics.cross_entropy, np.log(5), rtol=1e-6)


@pytest.mark.parametrize(
    "name, meant",
    [
        ("mask", "where"),
        ("sample_weight", "weights"),
        ("tau", "temperature"),
        ("temprature", "temperature"),
        ("differentiate_teachers", "differentiate_teacher"),
        ("statistics", None),
        ("token_axis", "token_axes"),
        ("foo", None),
    ],
)
def test_an_argument_that_there_is_not(name, meant):
    hint = f"; did you mean `{meant}`\\?" if meant else ""
    for loss in FUNCTIONS:
        message = (
            rf"^{loss.__name__}\(\) got an unexpected keyword argument `{name}`{hint}$"
        )
        with pytest.raises(TypeError, match=message):
            loss(S, S, **{name: True})


def test_messages_say_what_came():
    for arguments, came in [
        (dict(temperature=-2.5), r"\[9.53674e-07, 1.04858e\+06\], got -2\.5"),
        (dict(reduction="average"), "average"),
        (dict(teacher=np.zeros((4, 5), np.float32)), r"\(4, 5\)|\(4,\)"),
        (dict(student=INT_LOGITS), "int"),
        (dict(labels=np.zeros(4, int), alpha=0.5), r"\(4,\)"),
        (dict(labels=np.full(3, 2**32 + 1), alpha=0.5), "4294967297"),
        (dict(labels="yes", alpha=0.5), "str"),
        (dict(vocab_size=6), "6"),
        (dict(tile=0), "0"),
    ]:
        with pytest.raises((ValueError, TypeError), match=came):
            _call(jaxkl.distillation_loss, arguments)


@pytest.mark.parametrize("loss", FUNCTIONS[:2])
def test_a_callable_that_closes_over_a_traced_value(rng, loss):
    s, t = rounded(rng, (3, 5)), rounded(rng, (3, 5))

    def f(scale):
        divergence = lambda log_p, log_q: scale * (log_p - log_q) ** 2
        return jax.tree.leaves(loss(s, t, divergence=divergence))[0]

    for transform in (jax.jit, jax.grad):
        with pytest.raises((ValueError, TypeError), match="`divergence`"):
            transform(f)(jnp.float32(2))


def test_a_callable_may_close_over_a_constant(rng):
    s, t = rounded(rng, (3, 5)), rounded(rng, (3, 5))
    scale = jnp.float32(3)
    divergence = lambda log_p, log_q: scale * (log_p - log_q)
    loss = lambda s: jaxkl.distillation_loss(s, t, divergence=divergence)
    difference = jax.nn.log_softmax(t) - jax.nn.log_softmax(s)
    expected = 3 * np.sum(difference, -1).mean()
    np.testing.assert_allclose(jax.jit(loss)(s), expected, rtol=1e-5)
    assert jax.jit(jax.grad(loss))(s).any()


def test_shapes_are_checked_under_jit():
    f = jax.jit(jaxkl.distillation_loss)
    with pytest.raises(ValueError, match="`teacher`"):
        f(S, np.zeros((4, 5), np.float32))


def test_hyperparameters_are_keyword_only():
    for function in FUNCTIONS:
        kinds = [p.kind for p in inspect.signature(function).parameters.values()]
        assert kinds[:2] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 2
        assert set(kinds[2:]) == {inspect.Parameter.KEYWORD_ONLY}


def test_signatures_are_the_contract():
    expected = dict(
        student=inspect.Parameter.empty,
        teacher=inspect.Parameter.empty,
        divergence=jaxkl.ForwardKL(),
        temperature=1.0,
        teacher_temperature=None,
        t_squared=True,
        labels=None,
        alpha=None,
        label_smoothing=0.0,
        z_loss=0.0,
        where=None,
        weights=None,
        vocab_size=None,
        differentiate_teacher=False,
        reduction="mean",
        normalizer=None,
        axis_name=None,
        mesh=None,
        token_axes=None,
        vocab_axis=None,
        tile=None,
        plan=None,
    )
    for function in FUNCTIONS:
        parameters = inspect.signature(function).parameters
        more = {}
        if function is jaxkl.distillation_loss_with_metrics:
            more = dict(per_token_metrics=False)
        assert {name: p.default for name, p in parameters.items()} == expected | more
