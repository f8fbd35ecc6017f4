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

F, NAN = np.float32, float("nan")
ones = lambda *shape: np.ones(shape, F)
zeros = lambda *shape: np.zeros(shape, F)

# For each argument: values of it, or arguments with which it is named.
VALUE_ERRORS = {
    "student": [F(0), dict(student=zeros(3, 0), teacher=zeros(3, 0))],
    "teacher": [F(0), zeros(4, 5), zeros(1, 5), zeros(5), zeros(1, 3, 5)],
    "vocab_size": [
        *(dict(teacher=zeros(3, 6)), dict(student=zeros(3, 6))),
        *(6, 0, dict(teacher=zeros(3, 4), vocab_size=5)),
    ],
    "reduction": ["average", "batchmean", None],
    "temperature": [
        *(0.0, -1, NAN, float("inf"), 2e6, F([1, 1e-7, 1]), F([1, 0, 1])),
        *(ones(4), ones(3, 1), ones(1)),
    ],
    "teacher_temperature": [0.0, 1e-14, ones(3, 5)],
    "alpha": [dict(alpha=x, labels=LABELS) for x in (-0.1, 1.1, NAN)],
    "labels": [
        dict(alpha=0.5),
        dict(alpha=0.5, labels=np.array([0, 4, 1]), vocab_size=4),
        *(
            dict(alpha=0.5, labels=x)
            for x in (
                *(np.zeros(4, int), np.zeros((3, 5), int)),
                *(np.array([0, 5, 1]), np.array([0, -1, 1])),
                # These wrap to 1 and to -100.
                *(np.array([0, 2**32 + 1, 1]), [0, 2**32 + 1, 1]),
                np.array([0, 2**32 - 100, 1], np.uint32),
                np.array([0, 2**32 + 1, 1], np.uint64),
            )
        ),
    ],
    "label_smoothing": [
        dict(label_smoothing=x, labels=LABELS, alpha=0.5) for x in (-0.1, 1.5)
    ],
    "z_loss": [-1e-4, NAN],
    "where": [np.ones(4, bool), np.ones((3, 5), bool), np.bool_(True)],
    "weights": [ones(4), ones(3, 5)],
    "normalizer": [
        *(0.0, -3, NAN, np.int32(0), ones(3)),
        *(dict(normalizer=3.0, reduction=x) for x in ("sum", "none")),
    ],
    "tile": [0, -4],
    "divergence": [lambda log_p, log_q: jnp.sum(log_p - log_q, -1)],
}
TYPE_ERRORS = {
    "student": [INT_LOGITS, INT_LOGITS.astype(bool), S.astype(np.complex64), "gpt2"],
    "teacher": [INT_LOGITS, "gpt2"],
    "labels": [
        dict(alpha=0.5, labels=x)
        for x in (zeros(3), np.zeros(3, bool), "yes", [0, None, 1])
    ],
    "where": ["all", [True, None, True], ones(3), np.ones(3, int)],
    "weights": ["all", np.ones(3, int), np.ones(3, bool)],
    "temperature": ["2"],
    "alpha": [dict(alpha="0.5", labels=LABELS)],
    "normalizer": ["3"],
    "teacher.indices": [dict(teacher=jaxkl.SparseTeacher("top", S[:, :2]))],
    "tile": [2.5],
    "vocab_size": [2.5],
    "divergence": ["forward_kl", None, jaxkl.ForwardKL, jaxkl.JensenShannon],
}
ERRORS = [
    (error, name, x if isinstance(x, dict) else {name: x})
    for error, cases in ((ValueError, VALUE_ERRORS), (TypeError, TYPE_ERRORS))
    for name, values in cases.items()
    for x in values
]
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


scaled = _head(lambda scale, x: scale * x, F(2))
swapped = _head(lambda x, params: x @ params["kernel"], {"kernel": KERNEL})
KIND_ERRORS = {  # the argument, and what the TypeError says
    "a module": ("student", Module(), r".*got Module, .*FunctionHead\(apply, params"),
    "a module as teacher": ("teacher", Module(), r".*LinearHead\(hidden, kernel\)"),
    "a model's output": ("student", Output(), ".*Output: pass its `logits`"),
    "a tuple": (
        "student", (HIDDEN, KERNEL), r".*a tuple of 2: .*LinearHead\(hidden, kernel\)\."
    ),
    "teachers": (
        "teacher", [S, S], ".*a list of 2: .*several teachers, add up the loss to each"
    ),
    "heads of teachers": (
        "teacher", [jaxkl.LinearHead(HIDDEN, KERNEL)], ".*got a list of 1: "
    ),
}  # fmt: skip
FUNCTIONS = (
    jaxkl.distillation_loss,
    jaxkl.distillation_loss_with_metrics,
    jaxkl.reference.distillation_loss,
)


def _call(loss, arguments):
    arguments = dict(student=S, teacher=S) | arguments
    return loss(arguments.pop("student"), arguments.pop("teacher"), **arguments)


@pytest.mark.parametrize("loss", FUNCTIONS)
@pytest.mark.parametrize("error", [ValueError, TypeError])
def test_errors_name_the_argument(loss, error):
    for kind, name, arguments in ERRORS:
        if kind is error:
            with pytest.raises(error, match=f"`{name}`"):
                _call(loss, arguments)
                pytest.fail(f"no error of {arguments}")


@pytest.mark.parametrize("name, x, says", KIND_ERRORS.values(), ids=KIND_ERRORS)
def test_errors_name_the_way_out(name, x, says):
    with pytest.raises(TypeError, match=f"`{name}` {says}"):
        _call(jaxkl.distillation_loss, {name: x})


def test_errors_of_heads_name_the_way_out():
    says = "`student.kernel` .*got Module, which can be called: pass its array"
    with pytest.raises(TypeError, match=says):
        jaxkl.distillation_loss(jaxkl.LinearHead(HIDDEN, Module()), S)
    with pytest.raises(ValueError, match="`student.apply` must be .*Swap its arg"):
        jaxkl.distillation_loss(swapped, S)
    says = "`student.apply` makes as many columns as its hidden states have, 4"
    for options in {}, dict(vocab_size=5):
        with pytest.raises(ValueError, match=says):
            jaxkl.distillation_loss(scaled, S, **options)


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


@pytest.mark.parametrize("loss", [FUNCTIONS[0], *rarely(*FUNCTIONS[1:])])
def test_the_correct_call_beside_the_errors(loss):
    # So that the errors above come from the one argument that is wrong.
    arrays = dict(temperature=ones(3), where=np.ones(3, bool), weights=ones(3))
    numbers = dict(teacher_temperature=1.0, alpha=0.5, label_smoothing=1.0, z_loss=0.0)
    others = dict(labels=np.array([0, -100, 4]), normalizer=3, vocab_size=5, tile=2)
    arguments = dict(student=zeros(3, 6)) | arrays | numbers | others
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


HINTS = dict(mask="where", sample_weight="weights", token_axis="token_axes")
HINTS |= dict(tau="temperature", temprature="temperature", statistics=None, foo=None)
HINTS |= dict(differentiate_teachers="differentiate_teacher")


@pytest.mark.parametrize("loss", FUNCTIONS)
def test_an_argument_that_there_is_not(loss):
    start = rf"^{loss.__name__}\(\) got an unexpected keyword argument"
    for name, meant in HINTS.items():
        hint = f"; did you mean `{meant}`\\?" if meant else ""
        with pytest.raises(TypeError, match=f"{start} `{name}`{hint}$"):
            loss(S, S, **{name: True})


def test_messages_say_what_came():
    for arguments, came in [
        (dict(temperature=-2.5), r"\[9.53674e-07, 1.04858e\+06\], got -2\.5"),
        (dict(reduction="average"), "average"),
        (dict(teacher=zeros(4, 5)), r"\(4, 5\)|\(4,\)"),
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
    with pytest.raises(ValueError, match="`teacher`"):
        jax.jit(jaxkl.distillation_loss)(S, zeros(4, 5))


def test_signatures_are_the_contract():
    """All but the models are keywords; those of the reference are the same."""
    expected = dict(
        **dict.fromkeys(("student", "teacher"), inspect.Parameter.empty),
        **dict(divergence=jaxkl.ForwardKL(), temperature=1.0, teacher_temperature=None),
        **dict(t_squared=True, labels=None, alpha=None, label_smoothing=0.0),
        **dict(z_loss=0.0, where=None, weights=None, vocab_size=None),
        **dict(differentiate_teacher=False, reduction="mean", normalizer=None),
        **dict(axis_name=None, mesh=None, token_axes=None, vocab_axis=None),
        **dict(tile=None, plan=None),
    )
    parameters = lambda f: inspect.signature(f).parameters
    defaults = lambda f: {name: p.default for name, p in parameters(f).items()}
    for function in FUNCTIONS:
        kinds = [p.kind for p in parameters(function).values()]
        assert kinds[:2] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 2
        assert set(kinds[2:]) == {inspect.Parameter.KEYWORD_ONLY}
    assert defaults(jaxkl.distillation_loss) == expected
    with_metrics = expected | dict(per_token_metrics=False)
    assert defaults(jaxkl.distillation_loss_with_metrics) == with_metrics
    for name in "distillation_loss", "cross_entropy", "token_log_probs":
        of_reference = getattr(jaxkl.reference, name)
        assert defaults(of_reference) == defaults(getattr(jaxkl, name))
