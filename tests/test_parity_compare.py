"""`jaxkl parity compare` names the classic mistakes, and only where they are."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from jaxkl.__main__ import main
from jaxkl.parity import compare, ParityError, Recording

from .cases import rarely


rng = np.random.default_rng(0)
logits = (2 * rng.normal(size=(2, 8, 50))).astype(np.float32)
x, log_t = log_softmax(logits, -1).astype(np.float32)
t = np.exp(log_t)
mask = np.arange(8) < 5
ARRAYS = {"input": x, "target": t}
RAW = {"input": logits[0], "target": logits[1]}
MODELS = {"student": logits[0], "teacher": logits[1]}


def check(arrays, **options):
    arrays = {k: np.asarray(v) for k, v in (ARRAYS | arrays).items()}
    if "student" in arrays:
        del arrays["input"], arrays["target"]
    return compare(Recording("file", arrays), **options)


def torch_loss(input, target, reduction="batchmean", log_target=False):
    """What a PyTorch user would have recorded, with both gradients."""
    input, target = (torch.tensor(a).requires_grad_() for a in (input, target))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = torch.nn.functional.kl_div(
            input, target, reduction=reduction, log_target=log_target
        )
    grads = torch.autograd.grad(loss.sum(), (input, target))
    loss, *grads = (a.detach().numpy() for a in (loss, *grads))
    return dict(loss=loss, grad_input=grads[0], grad_target=grads[1])


def of_models(temperature=1.0, mask=None, factor=None, mean=True):
    """What a PyTorch user records who writes `distillation_loss` by hand."""
    s, t = (torch.tensor(x).requires_grad_() for x in logits)
    T = temperature
    log_q, p = torch.log_softmax(s / T, -1), torch.softmax(t / T, -1)
    terms = torch.nn.functional.kl_div(log_q, p, reduction="none")
    rows = (factor or T * T) * terms.sum(-1)
    rows = rows if mask is None else rows[torch.tensor(mask)]
    loss = rows.mean() if mean else rows.sum()
    names = "loss", "grad_student", "grad_teacher"
    values = loss, *torch.autograd.grad(loss, (s, t))
    return {n: x.detach().numpy() for n, x in zip(names, values, strict=True)}


def of_logits(*arguments, **options):
    """The same, of a file that calls the logits `input` and `target`."""
    found = of_models(*arguments, **options)
    return RAW | dict(loss=found["loss"], grad_input=found["grad_student"])


def loss(*arguments, **options):
    return dict(loss=torch_loss(*arguments, **options)["loss"])


kl = torch_loss(x, t)
rows = torch_loss(x, t, "none")["loss"].sum(-1)
nine_times = {k: np.float32(9) * v for k, v in kl.items()}
cross_entropy = dict(loss=-(t * x).sum() / 8, grad_input=-t / 8)
three_axes = {k: a.reshape(2, 4, 50) for k, a in ARRAYS.items()}
T = lambda number: {"temperature": np.float32(number)}
LOG = dict(log_target=True)
PASSED = "passed as log-probabilities"
LOGITS = "the file holds logits"

# What the file holds, the options: the mistake, and its evidence.
MISTAKES = [
    (torch_loss(x, t, "mean"), {}, "mean for batchmean", "right / recorded = 50"),
    (of_logits(2.0) | T(2), {}, f"{LOGITS}: input and target", "softmax(target / 2)"),
    (of_logits(2.0), {}, f"{LOGITS}: input and target, at T = 2 (give", "* 2**2"),
    (torch_loss(x, t, "sum"), {}, "sum for batchmean", "= 0.125"),
    (kl, dict(reduction="mean"), "batchmean for mean", "= 0.02"),
    (kl | T(3), {}, "missing T²", "right / recorded = 9"),
    (dict(loss=4 * kl["loss"]), {}, "T²", "right times 2²"),
    (torch_loss(x, t, **LOG), {}, "log_target wrong", "log_target=True"),
    (loss(np.exp(x), t), {}, f"probabilities {PASSED}: input", "kl_div(exp(input)"),
    (
        # All that is NaN looks alike: the gradient tells.
        loss(x, log_t) | dict(grad_input=torch_loss(x, log_t)["grad_input"]),
        {},
        "log-probabilities passed as probabilities: target",
        "log(target)",
    ),
    (
        loss(x, t, **LOG) | {"target": log_t},
        LOG,
        f"probabilities {PASSED}: target",
        "exp(target)",
    ),
    (
        loss(x, t) | {"input": np.exp(x)},
        {},
        "the file holds probabilities, their logarithm was taken",
        "kl_div(log(input)",
    ),
    (loss(log_t, np.exp(x)), {}, "reversed direction", "kl_div(log(target), exp("),
    (cross_entropy, {}, "cross-entropy taken for KL", "is the entropy of target"),
    (
        dict(loss=rows[:5].sum() / 8, mask=mask),
        {},
        "mean over padding",
        "right / recorded = 1.6",
    ),
    (dict(loss=rows.sum() / 8, mask=mask), {}, "padding not masked", ""),
    (
        dict(loss=rows[:5].sum() / 5, target=t * mask[:, None]),
        {},
        "mean over padding",
        "rows whose target is not 0",
    ),
    (
        three_axes | dict(loss=rows.sum() / 8),
        {},
        "mean over all rows for batchmean",
        "right / recorded = 4",
    ),
    (loss(x, t) | {"input": x + 1}, {}, f"{LOGITS}: input", "log_softmax(input)"),
    (
        of_logits(4.0),
        dict(temperature=4.0, **LOG),
        f"{LOGITS}: input and target",
        "log_softmax(target / 4)",
    ),
    (
        of_logits(factor=4) | T(2),
        {},
        f"{LOGITS}, not divided by T: input and target",
        "* 2**2",
    ),
    (loss(x, t, "mean") | T(3), {}, "mean for batchmean, and missing T²", "= 450"),
]


@pytest.mark.parametrize(
    "arrays, options, name, evidence",
    [*MISTAKES[1:3], *rarely(MISTAKES[0], *MISTAKES[3:])],
)
def test_names_the_mistake(arrays, options, name, evidence):
    found = check(arrays, **options)
    assert not found.agrees
    assert all(r.agrees for r in found.both), "jaxkl and PyTorch agree nevertheless"
    assert not all(r.agrees for r in found.recorded)
    (mistake,) = [m for m in found.mistakes if "every row" not in m.evidence]
    assert mistake.name.startswith(name) and evidence in mistake.evidence


RAW_LOGITS = "raw logits passed as"


@pytest.mark.parametrize(
    "arrays, options, names",
    [
        ({"input": np.exp(x)}, {}, [f"probabilities {PASSED}: input"]),
        ({"target": log_t}, {}, ["log_target wrong: log-probabilities passed as"]),
        ({}, LOG, ["log_target wrong: probabilities passed as"]),
        ({"input": logits[0]}, {}, [f"{RAW_LOGITS} log-probabilities: input"]),
        ({"target": 1000 * logits[1]}, {}, [f"{RAW_LOGITS} probabilities: target"]),
        (RAW, LOG, [f"{RAW_LOGITS} log-probabilities: {name}" for name in ARRAYS]),
    ],
)
def test_names_what_the_arrays_show(arrays, options, names):
    """PyTorch computes the same from such arrays, and nobody means it."""
    every = ARRAYS | arrays
    recorded = torch_loss(every["input"], every["target"], **options)
    for recording in ({}, recorded):
        found = check(arrays | recording, **options)
        assert all(r.agrees for r in found.recorded) and not found.agrees
        for mistake, name in zip(found.mistakes, names, strict=True):
            assert mistake.name.startswith(name)
            raw = "softmax(" in mistake.evidence
            assert raw if RAW_LOGITS in name else "it holds" in mistake.evidence


@pytest.mark.parametrize(
    "arrays, options, says",
    [
        (of_models(3.0) | T(3), {}, None),
        (of_models(2.0, mask) | {"mask": mask}, dict(temperature=2.0), None),
        (of_models(2.0, mean=False), dict(temperature=2.0, reduction="sum"), None),
        (of_models(2.0, factor=1), dict(temperature=2.0), "missing T²"),
        (of_models(2.0), {}, "T = 2 (give it"),
        (of_models(mean=False), {}, "sum for the mean over rows"),
        (of_models(factor=4), dict(temperature=2.0), "logits not divided by T"),
    ],
)
def test_logits_of_two_models(arrays, options, says):
    found = check(MODELS | arrays, **options)
    assert [r.quantity for r in found.both] == ["value", "d_input", "d_target"]
    assert all(r.agrees for r in found.both) and len(found.recorded) == 3
    assert found.agrees == (says is None) == (not found.mistakes)
    assert says is None or found.mistakes[0].name.startswith(says)


@pytest.mark.parametrize(
    "arrays, options",
    [
        (kl, {}),
        *rarely(
            (torch_loss(x, t, "mean"), dict(reduction="mean")),
            (torch_loss(x, t, "none"), dict(reduction="none")),
            (torch_loss(x, log_t, **LOG) | {"target": log_t}, LOG),
            (nine_times | T(3), {}),
            (dict(loss=kl["loss"][None]), {}),
        ),
        (dict(loss=rows[:5].sum() / 5, mask=mask), {}),
        # NaN in padding does not count.
        (dict(input=np.where(mask[:, None], x, np.nan), mask=mask), {}),
    ],
)
def test_agrees(arrays, options):
    found = check(arrays, **options)
    assert found.agrees and not found.mistakes
    assert {r.name for r in found.recorded} == arrays.keys() & kl.keys()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype):
    narrow = lambda a: np.asarray(a).astype(jnp.dtype(dtype))
    arrays = {name: narrow(a) for name, a in ARRAYS.items()}
    tensors = [torch.tensor(a.astype(np.float32)) for a in arrays.values()]
    total = torch.nn.functional.kl_div(*tensors, reduction="sum").numpy()
    assert check(arrays | {"loss": narrow(total / 8)}).agrees
    (mistake,) = check(arrays | {"loss": narrow(total / x.size)}).mistakes
    assert mistake.name == "mean for batchmean"


WITH_NAN = np.where(np.isin(np.arange(x.size).reshape(x.shape), (52, 154)), np.nan, x)
UNKNOWN = "none of the known mistakes"


@pytest.mark.parametrize(
    "arrays, name, says",
    [
        (dict(input=WITH_NAN), "NaN in input", "2 of 400 numbers of `input` are NaN"),
        (dict(target=WITH_NAN), "NaN in target", "are NaN, the first at [1, 2]"),
        (dict(loss=0.777), UNKNOWN, "right / recorded = "),
        (dict(loss=0.0), UNKNOWN, "recorded - right = "),
        (dict(input=x[0, 0], target=t, loss=0.777), UNKNOWN, "right / recorded = "),
        (kl | {"grad_input": 0 * x}, UNKNOWN, ""),
    ],
)
def test_says_where_nan_is_and_if_it_does_not_know(arrays, name, says):
    arrays = {k: np.float32(v) for k, v in (dict(loss=kl["loss"]) | arrays).items()}
    (mistake,) = check(arrays).mistakes
    assert mistake.name == name and says in mistake.evidence


@pytest.mark.parametrize(
    "arrays, says",
    [
        ({"target": t[:5]}, "do not broadcast"),
        ({"loss": rows}, r"`loss` has shape \(8,\), expected \(\) with --reduction"),
        ({"grad_input": t[:5]}, r"`grad_input` has shape \(5, 50\)"),
        ({"mask": mask[:5]}, "`mask` has shape"),
        (
            {"input": x[:0], "target": t[:0]},
            r"`input` \(0, 50\) and .* hold no numbers",
        ),
        (MODELS | {"teacher": t[:1]}, "must be logits of one shape"),
        (MODELS | {"grad_student": t[:5]}, "`grad_student` has shape"),
    ],
)
def test_other_shapes(arrays, says):
    with pytest.raises(ParityError, match=says):
        check(arrays)


@pytest.mark.parametrize("temperature", [0.0, np.nan, np.inf, -1.0, 1e200, 1e-200])
def test_invalid_temperatures(temperature):
    with pytest.raises(ParityError, match="`temperature` must be positive and finite"):
        check({}, temperature=temperature)


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the command on files with these arrays, in `tmp_path`: status and output."""

    def run(*arguments, **files):
        for name, arrays in files.items():
            np.savez(tmp_path / f"{name}.npz", **arrays)
        paths = [str(tmp_path / f"{name}.npz") for name in files]
        status = main(["parity", "compare", *paths, *arguments])
        return status, "".join(capsys.readouterr())

    return run


def test_command_of_two_models(run):
    models = MODELS | of_models(2.0)
    status, shown = run("--temperature", "2", models=models)
    assert status == 0 and "distillation_loss in jaxkl and in PyTorch" in shown
    assert "grad_student" in shown and "d_teacher" in shown and "input" not in shown
    status, shown = run("--log-target", models=models)
    assert status == 2 and "leave out --reduction none and --log-target" in shown


def test_command(run, tmp_path):
    right, wrong = ARRAYS | kl, ARRAYS | torch_loss(x, t, "mean")
    status, shown = run(right=right)
    assert status == 0 and "agree to" in shown and shown.endswith("\nagreed\n")
    status, shown = run(right=right, wrong=wrong)
    assert status == 1 and shown.endswith("\nNOT agreed\n")
    assert "\nmean for batchmean:\n  recorded " in shown
    assert run("--reduction", "mean", wrong=wrong)[0] == 0
    files = [str(tmp_path / name) for name in ("x.npy", "t.npy")]
    for file, array in zip(files, (x, log_t), strict=True):
        np.save(file, array)
    assert run("--log-target", *files)[0] == 0
    status, shown = run("--temperature", "0", *files)
    assert status == 2 and "`temperature`" in shown
