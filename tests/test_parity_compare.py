"""`jaxkl parity compare` names the classic mistakes, and only where they are."""

import json
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from jaxkl.__main__ import main
from jaxkl.parity import compare, ParityError, Recording

from .cases import rarely


TEMPERATURE = 3.0
rng = np.random.default_rng(0)
logits = (2 * rng.normal(size=(2, 8, 50))).astype(np.float32)
x, log_t = log_softmax(logits, -1).astype(np.float32)
t = np.exp(log_t)
mask = np.arange(8) < 5
ARRAYS = {"input": x, "target": t}


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


def scaled(recorded, factor):
    return {k: (factor * v).astype(v.dtype) for k, v in recorded.items()}


def only_loss(value):
    return dict(loss=np.float32(value))


def of_logits(temperature, log_target=False):
    """What a PyTorch user records who divides logits by T: all but `grad_target`."""
    z, w = (torch.tensor(a).requires_grad_() for a in logits)
    target = torch.log_softmax(w / temperature, -1)
    loss = temperature**2 * torch.nn.functional.kl_div(
        torch.log_softmax(z / temperature, -1),
        target if log_target else target.exp(),
        reduction="batchmean",
        log_target=log_target,
    )
    (grad,) = torch.autograd.grad(loss, z)
    return dict(loss=loss.detach().numpy(), grad_input=grad.numpy())


kl = torch_loss(x, t)
rows = torch_loss(x, t, "none")["loss"].sum(-1)
cross_entropy = dict(loss=-(t * x).sum() / 8, grad_input=-t / 8)

# What was recorded, more arrays of the file, options: the mistake, and its evidence.
MISTAKES = {
    "mean": (
        torch_loss(x, t, "mean"),
        {},
        {},
        ("mean for batchmean", "right / recorded = 50"),
    ),
    "sum": (torch_loss(x, t, "sum"), {}, {}, ("sum for batchmean", "= 0.125")),
    "batchmean": (kl, {}, dict(reduction="mean"), ("batchmean for mean", "= 0.02")),
    "T": (
        kl,
        {"temperature": np.float64(TEMPERATURE)},
        {},
        ("missing T²", "right / recorded = 9"),
    ),
    "T option": (kl, {}, dict(temperature=2.0), ("missing T²", "recorded = 4")),
    "T unknown": (only_loss(4 * kl["loss"]), {}, {}, ("T²", "right times 2²")),
    "log_target": (
        torch_loss(x, t, log_target=True),
        {},
        {},
        ("log_target wrong", "log_target=True"),
    ),
    "no log_target": (
        torch_loss(x, log_t),
        {"target": log_t},
        dict(log_target=True),
        ("log_target wrong", "recorded nan"),
    ),
    "probabilities": (
        only_loss(torch_loss(np.exp(x), t)["loss"]),
        {},
        {},
        ("probabilities passed as log-probabilities: input", "kl_div(exp(input)"),
    ),
    "log-probabilities": (
        # All that is NaN looks alike: the gradient tells.
        {k: torch_loss(x, log_t)[k] for k in ("loss", "grad_input")},
        {},
        {},
        ("log-probabilities passed as probabilities: target", "log(target)"),
    ),
    "probabilities, log_target": (
        only_loss(torch_loss(x, t, log_target=True)["loss"]),
        {"target": log_t},
        dict(log_target=True),
        ("probabilities passed as log-probabilities: target", "exp(target)"),
    ),
    "reversed": (
        only_loss(torch_loss(log_t, np.exp(x))["loss"]),
        {},
        {},
        ("reversed direction", "kl_div(log(target), exp(input)"),
    ),
    "cross-entropy": (
        cross_entropy,
        {},
        {},
        ("cross-entropy taken for KL", "is the entropy of target"),
    ),
    "padding": (
        only_loss(rows[:5].sum() / 8),
        {"mask": mask},
        {},
        ("mean over padding", "right / recorded = 1.6"),
    ),
    "padding counted": (
        only_loss(rows.sum() / 8),
        {"mask": mask},
        {},
        ("padding not masked", ""),
    ),
    "padding without a mask": (
        only_loss(rows[:5].sum() / 5),
        {"target": t * mask[:, None]},
        {},
        ("mean over padding", "5 of 8 rows"),
    ),
    "rows": (
        only_loss(rows.sum() / 8),
        {"input": x.reshape(2, 4, 50), "target": t.reshape(2, 4, 50)},
        {},
        ("mean over all rows for batchmean", "right / recorded = 4"),
    ),
    "logits": (
        only_loss(kl["loss"]),
        {"input": x + 1},
        {},
        ("the file holds logits: input", "log_softmax(input)"),
    ),
    "logits at T": (
        of_logits(2.0),
        dict(input=logits[0], target=logits[1], temperature=np.float32(2)),
        {},
        (
            "the file holds logits: input and target",
            "kl_div(log_softmax(input / 2), softmax(target / 2)",
        ),
    ),
    "logits at T, log_target": (
        of_logits(2.0, log_target=True),
        dict(input=logits[0], target=logits[1]),
        dict(temperature=2.0, log_target=True),
        ("the file holds logits: input and target", "log_softmax(target / 2)"),
    ),
    "logits of the student at T": (
        of_logits(2.0),
        dict(
            input=logits[0],
            target=np.exp(log_softmax(logits[1] / 2, -1)),
            temperature=np.float32(2),
        ),
        {},
        ("the file holds logits: input", "kl_div(log_softmax(input / 2), target,"),
    ),
    "logits at T, missing T²": (
        scaled(of_logits(2.0), 1 / 4),
        dict(input=logits[0], target=logits[1], temperature=np.float32(2)),
        {},
        ("missing T², and the file holds logits: input and target", "= 0.8253"),
    ),
    "logits, not divided by T": (
        scaled(of_logits(1.0), 4),
        dict(input=logits[0], target=logits[1], temperature=np.float32(2)),
        {},
        ("the file holds logits, not divided by T: input and target", "* 2**2"),
    ),
    "logits at T, T unknown": (
        of_logits(2.0),
        dict(input=logits[0], target=logits[1]),
        {},
        ("the file holds logits: input and target, at T = 2 (give", "* 2**2"),
    ),
    "logits, log_target": (
        of_logits(1.0, log_target=True),
        dict(input=logits[0], target=log_t),
        dict(log_target=True),
        ("the file holds logits: input", "kl_div(log_softmax(input), target,"),
    ),
    "two": (
        only_loss(torch_loss(x, t, "mean")["loss"]),
        {"temperature": np.float64(TEMPERATURE)},
        {},
        ("mean for batchmean, and missing T²", "= 450"),
    ),
}


OFTEN = ["mean", "logits at T", "logits at T, T unknown"]


@pytest.mark.parametrize("name", [*OFTEN, *rarely(*sorted(set(MISTAKES) - {*OFTEN}))])
def test_names_the_mistake(name):
    recorded, more, options, says = MISTAKES[name]
    arrays = ARRAYS | {k: np.asarray(v) for k, v in (recorded | more).items()}
    found = compare(Recording("file", arrays), **options)
    assert not found.agrees
    assert all(r.agrees for r in found.both), "jaxkl and PyTorch agree nevertheless"
    assert not all(r.agrees for r in found.recorded)
    (mistake,) = found.mistakes
    name, evidence = says
    assert mistake.name.startswith(name) and evidence in mistake.evidence


def test_names_what_the_arrays_show():
    """Numbers as PyTorch's, of arrays that are not what they should be."""
    for arrays, options, says in [
        ({"input": np.exp(x)}, {}, "probabilities passed as log-probabilities: input"),
        ({"target": log_t}, {}, "log_target wrong: log-probabilities"),
        ({}, dict(log_target=True), "log_target wrong: probabilities"),
    ]:
        arrays = ARRAYS | arrays
        recorded = torch_loss(arrays["input"], arrays["target"], **options)
        found = compare(Recording("file", arrays | recorded), **options)
        assert all(r.agrees for r in found.recorded)
        (mistake,) = found.mistakes
        assert mistake.name.startswith(says) and "it holds" in mistake.evidence
        assert not found.agrees


@pytest.mark.parametrize("scale", [1, 1000])
def test_names_raw_logits(scale, tmp_path, capsys):
    """PyTorch computes the same, and a loss below 0: nobody means it."""
    raw, target = scale * logits[0], scale * logits[1]
    path = tmp_path / "raw.npz"
    for arrays, options, says in [
        ({"input": raw}, {}, ["raw logits passed as log-probabilities: input"]),
        (
            {"input": raw, "target": target},
            dict(log_target=True),
            [f"raw logits passed as log-probabilities: {n}" for n in ARRAYS],
        ),
        ({"target": target}, {}, ["raw logits passed as probabilities: target"]),
    ]:
        arrays = ARRAYS | arrays
        recorded = torch_loss(arrays["input"], arrays["target"], **options)
        for recording in ({}, recorded):
            found = compare(Recording("file", arrays | recording), **options)
            assert [m.name for m in found.mistakes] == says and not found.agrees
            assert "softmax(" in found.mistakes[0].evidence
    np.savez(path, **ARRAYS | {"input": raw}, loss=torch_loss(raw, t)["loss"])
    assert main(["parity", "compare", str(path)]) == 1
    assert "kl_div takes log_softmax(input)" in capsys.readouterr().out


def of_models(temperature=1.0, mask=None, **changes):
    """What a PyTorch user records who writes `distillation_loss` by hand."""
    s, t = (torch.tensor(x).requires_grad_() for x in logits)
    T = temperature
    log_q, p = torch.log_softmax(s / T, -1), torch.softmax(t / T, -1)
    terms = torch.nn.functional.kl_div(log_q, p, reduction="none")
    rows = changes.get("factor", T * T) * terms.sum(-1)
    rows = rows if mask is None else rows[torch.tensor(mask)]
    loss = rows.mean() if changes.get("mean", True) else rows.sum()
    names = "loss", "grad_student", "grad_teacher"
    values = loss, *torch.autograd.grad(loss, (s, t))
    return {n: x.detach().numpy() for n, x in zip(names, values, strict=True)}


MODELS = {"student": logits[0], "teacher": logits[1]}


@pytest.mark.parametrize(
    "recorded, more, options, says",
    [
        (of_models(), {}, {}, None),
        (of_models(3.0), {"temperature": np.float64(3)}, {}, None),
        (of_models(2.0, mask), {"mask": mask}, dict(temperature=2.0), None),
        (of_models(2.0, mean=False), {}, dict(temperature=2.0, reduction="sum"), None),
        (of_models(2.0, factor=1), {}, dict(temperature=2.0), "missing T²"),
        (of_models(2.0), {}, {}, "T = 2 (give it"),
        (of_models(mean=False), {}, {}, "sum for the mean over rows"),
        (of_models(factor=4), {}, dict(temperature=2.0), "logits not divided by T"),
    ],
)
def test_logits_of_two_models(recorded, more, options, says):
    found = compare(Recording("file", MODELS | recorded | more), **options)
    names = [r.quantity for r in found.both]
    assert names == ["value", "d_student", "d_teacher"]
    assert all(r.agrees for r in found.both)
    assert [r.name for r in found.recorded] == [*recorded]
    assert found.agrees == (says is None) and "student" in str(found.formula)
    if says is None:
        assert not found.mistakes
    else:
        assert found.mistakes[0].name.startswith(says)
        assert "input" not in found.mistakes[0].evidence


def test_logits_of_two_models_on_the_command_line(tmp_path, capsys):
    path = tmp_path / "models.npz"
    np.savez(path, **MODELS, **of_models(2.0))
    assert main(["parity", "compare", str(path), "--temperature", "2"]) == 0
    assert "distillation_loss in jaxkl and in PyTorch" in capsys.readouterr().out
    assert main(["parity", "compare", str(path), "--log-target"]) == 2
    assert "leave out --reduction none and --log-target" in capsys.readouterr().err
    np.savez(path, **MODELS, **ARRAYS)
    assert main(["parity", "compare", str(path)]) == 2
    assert "beside `student`" in capsys.readouterr().err


RIGHT = {
    "batchmean": (kl, {}, {}),
    "mean": (torch_loss(x, t, "mean"), {}, dict(reduction="mean")),
    "none": (torch_loss(x, t, "none"), {}, dict(reduction="none")),
    "log_target": (
        torch_loss(x, log_t, log_target=True),
        {"target": log_t},
        dict(log_target=True),
    ),
    "T": (scaled(kl, 9), {"temperature": np.float64(TEMPERATURE)}, {}),
    "mask": (only_loss(rows[:5].sum() / 5), {"mask": mask}, {}),
    "python float": (dict(loss=np.asarray(float(kl["loss"]))), {}, {}),
    "shape (1,)": (dict(loss=kl["loss"][None]), {}, {}),
    "nothing": ({}, {}, {}),
}


@pytest.mark.parametrize("recorded, more, options", RIGHT.values(), ids=RIGHT)
def test_agrees(recorded, more, options):
    found = compare(Recording("file", ARRAYS | recorded | more), **options)
    assert found.agrees and not found.mistakes
    assert len(found.recorded) == len(recorded)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype):
    kind = getattr(torch, dtype)
    x_, t_ = torch.tensor(x).to(kind), torch.tensor(t).to(kind)
    arrays = {
        name: a.double().numpy().astype(jnp.dtype(dtype))
        for name, a in (("input", x_), ("target", t_))
    }
    for reduction in ("batchmean", "mean"):
        loss = torch.nn.functional.kl_div(x_, t_, reduction="sum")
        loss = loss / (8 if reduction == "batchmean" else x.size)
        loss = loss.double().numpy().astype(jnp.dtype(dtype))
        found = compare(Recording("file", arrays | {"loss": loss}))
        names = [m.name for m in found.mistakes]
        assert names == ([] if reduction == "batchmean" else ["mean for batchmean"])


@pytest.mark.parametrize("name", ["input", "target"])
def test_says_where_nan_is(name, capsys, tmp_path):
    with_nan = ARRAYS[name].copy()
    with_nan[1, 2] = with_nan[3, 4] = np.nan
    path = tmp_path / "nan.npz"
    for loss in (kl["loss"], np.float32(np.nan)):
        np.savez(path, **ARRAYS | {name: with_nan, "loss": loss})
        assert main(["parity", "compare", str(path)]) == 1
        shown = capsys.readouterr().out
        assert f"NaN in {name}:\n  2 of 400 numbers of `{name}`" in shown
        assert "the first at [1, 2]" in shown
        assert "none of the known" not in shown and "recorded - right" not in shown


def test_nan_in_padding_does_not_count():
    padded = np.where(mask[:, None], x, np.nan)
    arrays = {"input": padded, "target": t, "mask": mask}
    found = compare(Recording("file", arrays | only_loss(rows[:5].sum() / 5)))
    assert found.recorded[0].agrees and not found.mistakes


@pytest.mark.parametrize(
    "arrays, says",
    [
        (ARRAYS | only_loss(0.777), "right / recorded = "),
        (ARRAYS | only_loss(0), "recorded - right = "),
        (ARRAYS | only_loss(np.inf), "recorded inf, right "),
        (dict(input=x[0, 0], target=t[0, 0]) | only_loss(9), "right / recorded = "),
        (dict(input=x[0, 0], target=t) | only_loss(0.777), "right / recorded = "),
    ],
)
def test_says_if_it_does_not_know(arrays, says):
    found = compare(Recording("file", arrays))
    (mistake,) = found.mistakes
    assert mistake.name == "none of the known mistakes"
    assert says in mistake.evidence


def test_says_if_it_does_not_know_a_gradient():
    wrong = ARRAYS | kl | {"grad_input": 0 * kl["grad_input"]}
    found = compare(Recording("file", wrong))
    assert [r.agrees for r in found.recorded] == [True, False, True]
    assert found.mistakes[0].name == "none of the known mistakes"


@pytest.mark.parametrize(
    "arrays, says",
    [
        ({"target": t[:5]}, "do not broadcast"),
        ({"loss": rows}, r"`loss` has shape \(8,\), expected \(\) with --reduction"),
        ({"grad_input": t[:5]}, r"`grad_input` has shape \(5, 50\)"),
        ({"mask": mask[:5]}, "`mask` has shape"),
    ],
)
def test_other_shapes(arrays, says):
    with pytest.raises(ParityError, match=says):
        compare(Recording("file", ARRAYS | arrays))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (2, 0), (1, 5, 0)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_nothing_to_compare(shape, reduction, tmp_path, capsys):
    path = tmp_path / "empty.npz"
    empty = np.zeros(shape, np.float32)
    loss = {} if reduction == "none" else dict(loss=np.float32(0))
    np.savez(path, input=empty, target=empty, **loss)
    assert main(["parity", "compare", str(path), "--reduction", reduction]) == 2
    shown = capsys.readouterr()
    assert not shown.out and shown.err.count("\n") == 1
    assert f"`input` {shape} and `target` {shape} hold no numbers" in shown.err


@pytest.mark.parametrize("temperature", ["0", "nan", "inf", "-1", "1e200", "1e-200"])
def test_invalid_temperatures(temperature, tmp_path, capsys):
    path = tmp_path / "right.npz"
    np.savez(path, **ARRAYS, **kl)
    command = ["parity", "compare", str(path), "--temperature", temperature]
    assert main(command) == 2
    shown = capsys.readouterr()
    assert not shown.out and shown.err.count("\n") == 1
    assert "`temperature` must be positive and finite" in shown.err
    assert shown.err.endswith(f"got {float(temperature):g}\n")


def test_command(tmp_path, capsys):
    path, wrong = tmp_path / "right.npz", tmp_path / "wrong.npz"
    np.savez(path, **ARRAYS, **kl)
    assert main(["parity", "compare", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "agree to" in shown and shown.rstrip().endswith("\nagreed")

    np.savez(wrong, **ARRAYS, **torch_loss(x, t, "mean"))
    report = tmp_path / "report.json"
    command = ["parity", "compare", str(path), str(wrong), "--json", str(report)]
    assert main(command) == 1
    assert "mean for batchmean:\n" in capsys.readouterr().out
    first, second = json.loads(report.read_text(encoding="utf-8"))
    assert first["agrees"] and not second["agrees"]
    assert second["mistakes"][0]["name"] == "mean for batchmean"
    assert main(["parity", "compare", str(wrong), "--reduction", "mean"]) == 0
    capsys.readouterr()

    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "t.npy", log_t)
    pair = [str(tmp_path / "x.npy"), str(tmp_path / "t.npy")]
    assert main(["parity", "compare", "--log-target", "--json", "-", *pair]) == 0
    assert json.loads(capsys.readouterr().out)[0]["agrees"]
