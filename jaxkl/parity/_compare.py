"""A user's own arrays: in both frameworks, and beside what was recorded."""

import dataclasses
import math
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from ._cases import Case
from ._errors import must, ParityError, require_torch
from ._files import Arrays, check_temperature, Recording
from ._formula import Formula
from ._measure import equal
from ._mistakes import (
    at_unknown_temperature,
    double_mistakes,
    Mistake,
    of_contents,
    single_mistakes,
)
from ._run import compare_cases, Result


GRADIENTS = "grad_input", "grad_target"


@dataclasses.dataclass(frozen=True)
class Recorded:
    """One recorded quantity beside its expected value, in float64."""

    name: str  # "loss", "grad_input" or "grad_target"
    recorded: np.ndarray
    expected: np.ndarray
    agrees: bool


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What was found about one file.

    A student and a teacher are `input` and `target` here; the report has their names.
    """

    path: str
    formula: Formula
    arrays: dict[str, str]
    both: tuple[Result, ...]  # in jaxkl and in PyTorch
    recorded: tuple[Recorded, ...]
    mistakes: tuple[Mistake, ...]

    @property
    def agrees(self) -> bool:
        every = *self.both, *self.recorded
        return all(r.agrees for r in every) and not self.mistakes


def compare(
    recording: Recording,
    reduction: str = "batchmean",
    log_target: bool = False,
    temperature: float | None = None,
) -> Comparison:
    """Compares jaxkl, PyTorch and what was recorded.

    The right loss is `kl_div(input, target, reduction=…, log_target=…)`, times T² if
    there is a `temperature`; of the logits `student` and `teacher` it is
    `distillation_loss`, in the mean over rows or with `reduction="sum"` their sum. If
    the file has a `mask`, only the rows that it marks are summed and counted.

    Raises:
      ParityError: If PyTorch is not installed, if shapes do not fit or hold nothing,
        or if `temperature` is not a positive number.
    """
    require_torch()
    path, arrays = recording.path, recording.arrays
    if temperature is None:
        temperature = float(arrays.get("temperature", np.ones(())).item())
    check_temperature(temperature)
    _check_shapes(path, arrays, reduction)
    rows = "mask" if "mask" in arrays else "all"
    right = Formula(reduction, log_target, temperature, rows)
    if "student" in arrays:
        right = _of_models(path, right)
        kl_div = lambda n: n.replace("student", "input").replace("teacher", "target")
        arrays = {kl_div(name): x for name, x in arrays.items()}
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both = _in_both(path, arrays, right)
        recorded = _evaluate(right, arrays)
        differs = not all(r.agrees for r in recorded)
        found = _explanations(right, arrays, recorded) if differs else []
        contents = of_contents(arrays, log_target, right.of_models)
        # The recording may be of the right loss, made of the file's logits.
        if any("logits" in m.name for m in found):
            contents = [m for m in contents if not m.name.startswith("raw logits")]
        if differs and not (contents or found):
            found = [_unknown(recorded[0])]
    shown = {k: f"{v.dtype}{list(v.shape)}" for k, v in arrays.items()}
    return Comparison(path, right, shown, both, recorded, (*contents, *found))


def _of_models(path: str, asked: Formula) -> Formula:
    """The formula of `distillation_loss`: T² KL in the mean over rows, or their sum."""
    must(
        asked.reduction != "none" and not asked.log_target,
        f"{path}: `student` and `teacher` are logits, of one loss: leave out "
        "--reduction none and --log-target",
    )
    changes = dict(input="log_softmax", target="log_softmax", log_target=True)
    reduction = "sum" if asked.reduction == "sum" else "rows"
    return replace(asked, reduction=reduction, of_models=True, **changes)


def _check_shapes(path: str, arrays: Arrays, reduction: str) -> None:
    of_models = "student" in arrays
    x, t = names = ("student", "teacher") if of_models else ("input", "target")
    shapes = [arrays[name].shape for name in names]
    which = f"{path}: `{x}` {shapes[0]} and `{t}` {shapes[1]}"
    one_shape = shapes[0] == shapes[1] != ()
    must(
        one_shape or not of_models, f"{which} must be logits of one shape, [..., vocab]"
    )
    try:
        shape = np.broadcast_shapes(*shapes)
    except ValueError:
        raise ParityError(f"{which} do not broadcast") from None
    must(0 not in shape, f"{which} hold no numbers: there is nothing to compare")
    gradients = {f"grad_{n}": s for n, s in zip(names, shapes, strict=True)}
    loss = shape if reduction == "none" else ()
    for name, wanted in {"loss": loss, "mask": shape[:-1], **gradients}.items():
        found = arrays[name].shape if name in arrays else wanted
        one_number = name == "loss" and wanted == () and math.prod(found) == 1
        hint = f" with --reduction {reduction}" if name == "loss" else ""
        says = f"{path}: `{name}` has shape {found}, expected {wanted}{hint}"
        must(found == wanted or one_number, says)


def _in_both(path: str, arrays: Arrays, right: Formula) -> tuple[Result, ...]:
    numbers = [arrays["input"], arrays["target"], np.ones(1)]
    options = dict(reduction=right.reduction, log_target=right.log_target)
    if right.of_models:
        reduction = right.reduction.replace("rows", "mean")
        options = dict(reduction=reduction, temperature=right.temperature)
        numbers += [arrays["mask"]] if right.rows == "mask" else []
    case = Case(
        "compare",
        path,
        (),
        options,
        lambda: numbers,
        (arrays["input"].dtype.name, arrays["target"].dtype.name),
        function="distillation_loss" if right.of_models else "kl_div",
    )
    return tuple(compare_cases([case]))


def _evaluate(formula: Formula, arrays: Arrays) -> tuple[Recorded, ...]:
    """What was recorded, beside what the formula gives in float64."""
    x, t = (jnp.asarray(arrays[n], jnp.float64) for n in ("input", "target"))
    mask = jnp.asarray(arrays["mask"], bool) if "mask" in arrays else None
    found = {}  # values, and the sizes of their terms
    with jax.numpy_rank_promotion("allow"):
        if "loss" in arrays:
            found["loss"] = map(np.asarray, formula(x, t, mask))
        if arrays.keys() & {*GRADIENTS}:
            total = lambda x, t: jnp.sum(formula(x, t, mask)[0])
            gradients = map(np.asarray, jax.grad(total, (0, 1))(x, t))
            for name, g in zip(GRADIENTS, gradients, strict=True):
                found[name] = g, np.max(np.abs(g), initial=0, where=np.isfinite(g))
    return tuple(
        Recorded(name, arrays[name], value, _near(name, arrays, value, size))
        for name, (value, size) in found.items()
        if name in arrays
    )


def _near(name: str, arrays: Arrays, value: np.ndarray, size: np.ndarray) -> bool:
    """Whether `value` was recorded, up to rounding."""
    dtypes = {arrays[n].dtype for n in ("input", "target", name)}
    eps = max(float(jnp.finfo(d).eps) for d in dtypes)
    # A sum is in float32 at least, and its rounding errors add up as a random walk.
    terms = arrays["input"].size if name == "loss" and value.ndim == 0 else 1
    tol = 4 * eps + math.sqrt(terms) * min(eps, float(np.finfo(np.float32).eps))
    recorded = arrays[name].astype(np.float64).reshape(value.shape)
    near = np.abs(recorded - value) <= tol * size
    return bool(np.where(np.isfinite(value), near, equal(recorded, value)).all())


def _explanations(
    right: Formula, arrays: Arrays, recorded: tuple[Recorded, ...]
) -> list[Mistake]:
    """The mistakes that explain everything that was recorded: the simplest kind."""
    for kind in (single_mistakes, double_mistakes, at_unknown_temperature):
        found = []
        for name, wrong in kind(right, arrays):
            values = _evaluate(wrong, arrays)
            if all(r.agrees for r in values):
                found.append(Mistake(name, _evidence(right, wrong, recorded, values)))
        if found:
            # The softmax of normalised rows changes nothing, so any other name is
            # better.
            return [m for m in found if "logits" not in m.name] or found[:1]
    return []


def _evidence(
    right: Formula,
    wrong: Formula,
    recorded: tuple[Recorded, ...],
    values: tuple[Recorded, ...],
) -> str:
    lines = []
    for r, value in zip(recorded, values, strict=True):
        if r.agrees:
            continue
        if r.name != "loss":
            lines.append(f"`{r.name}` is the gradient of {wrong}")
        elif r.expected.ndim:
            lines.append(f"`loss` is {wrong}")
        else:
            got, expected = float(r.recorded.item()), float(r.expected)
            lines.append(
                f"recorded {got:.7g} = {float(value.expected):.7g} = {wrong}; right: "
                f"{expected:.7g} = {right}{_relation(got, expected)}"
            )
            if wrong.terms == "cross-entropy":
                entropy = f"the difference, {got - expected:.7g}, is the entropy"
                lines.append(f"{entropy} of target")
    return "; ".join(lines)


def _unknown(loss: Recorded) -> Mistake:
    """No known mistake; but the ratio of the losses may be the square of a T."""
    name = "none of the known mistakes"
    if loss.name != "loss" or loss.agrees or loss.expected.ndim:
        return Mistake(name, "")
    got, right = float(loss.recorded.item()), float(loss.expected)
    evidence = f"recorded {got:.7g}, right {right:.7g}{_relation(got, right)}"
    square = got / right if right else math.nan
    for ratio, verb in ((square, "times"), (1 / (square or math.nan), "over")):
        root = math.sqrt(ratio) if 1 < ratio < math.inf else 0
        # Temperatures are usually multiples of a quarter.
        if root and abs(4 * root - round(4 * root)) < 1e-4 * root:
            name = "T² (give the temperature to be sure)"
            return Mistake(name, f"{evidence}: right {verb} {root:.6g}²")
    return Mistake(name, evidence)


def _relation(got: float, right: float) -> str:
    if not (math.isfinite(got) and math.isfinite(right)):
        return ""
    if got == 0:
        return f", recorded - right = {got - right:.7g}"
    return f", right / recorded = {right / got:.7g}"
