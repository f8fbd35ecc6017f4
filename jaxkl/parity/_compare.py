"""A user's own arrays: in both frameworks, and beside what was recorded."""

import dataclasses
import math
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from ._cases import Case
from ._errors import ParityError, require_torch
from ._files import Arrays, check_temperature, Recording
from ._measure import equal
from ._mistakes import (
    as_models,
    at_unknown_temperature,
    Candidates,
    double_mistakes,
    Formula,
    Mistake,
    nans,
    no_distributions,
    single_mistakes,
    wrong_contents,
)
from ._run import compare_cases, Result


GRADIENTS = "grad_input", "grad_target"


@dataclasses.dataclass(frozen=True)
class Recorded:
    """One recorded quantity beside its right value."""

    name: str  # "loss", "grad_input" or "grad_target"
    recorded: np.ndarray
    expected: np.ndarray
    agrees: bool


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What was found about one file."""

    path: str
    formula: Formula
    arrays: dict[str, str]
    both: tuple[Result, ...]  # kl_div in jaxkl and in PyTorch
    recorded: tuple[Recorded, ...]
    mistakes: tuple[Mistake, ...]

    @property
    def agrees(self) -> bool:
        ours = all(r.agrees for r in self.both)
        return ours and all(r.agrees for r in self.recorded) and not self.mistakes


def compare(
    recording: Recording,
    reduction: str = "batchmean",
    log_target: bool = False,
    temperature: float | None = None,
) -> Comparison:
    """Compares jaxkl, PyTorch and what was recorded.

    The right loss is `kl_div(input, target, reduction=…, log_target=…)`, times T² if
    there is a `temperature`. If the file has a `mask`, only the rows that it marks are
    summed and counted.

    Raises:
      ParityError: If PyTorch is not installed, if shapes do not fit or hold nothing,
        or if `temperature` is not a positive number.
    """
    require_torch()
    arrays = recording.arrays
    if temperature is None:
        temperature = float(arrays.get("temperature", np.ones(())).item())
    check_temperature(temperature)
    right = Formula(reduction, log_target, temperature, masked="mask" in arrays)
    of_models = "student" in arrays
    if of_models:
        right = _of_models(recording, right)
        names = {as_models(n): n for n in ("input", "target", *GRADIENTS)}
        arrays = {names.get(n, n): x for n, x in arrays.items()}
        recording = Recording(recording.path, arrays)
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _check_shapes(recording, reduction)
        both = _in_both(recording, right)
        truth = Evaluated(right, arrays)
        recorded = tuple(
            Recorded(name, arrays[name], truth.values[name], truth.agrees(name))
            for name in truth.names
        )
        bad, found = nans(arrays), []
        if not all(r.agrees for r in recorded):
            found = _explanations(truth, recorded)
        # The recording may be of the right loss, made of the file's logits.
        if not (of_models or any("logits" in mistake.name for mistake in found)):
            bad += no_distributions(arrays, log_target)
        if not (found or bad or all(r.agrees for r in recorded)):
            found = [_unknown(recorded)]
        contents = [] if of_models else wrong_contents(arrays, log_target)
        mistakes = (*bad, *contents, *found)
    shown = {k: f"{v.dtype}{list(v.shape)}" for k, v in arrays.items()}
    if of_models:
        shown = {as_models(k): v for k, v in shown.items()}
        both = tuple(replace(r, quantity=as_models(r.quantity)) for r in both)
        recorded = tuple(replace(r, name=as_models(r.name)) for r in recorded)
        mistakes = tuple(
            Mistake(as_models(m.name), as_models(m.evidence)) for m in mistakes
        )
    return Comparison(recording.path, right, shown, both, recorded, mistakes)


def _of_models(recording: Recording, asked: Formula) -> Formula:
    """The formula of `distillation_loss`: T² KL in the mean over rows, or their sum."""
    path, arrays = recording.path, recording.arrays
    if asked.reduction == "none" or asked.log_target:
        raise ParityError(
            f"{path}: `student` and `teacher` are logits, of one loss: leave out "
            "--reduction none and --log-target"
        )
    s, t = (arrays[name].shape for name in ("student", "teacher"))
    if s != t or not s:
        raise ParityError(
            f"{path}: `student` {s} and `teacher` {t} must be logits of one shape, "
            "[..., vocab]"
        )
    changes = dict(input="log_softmax", target="log_softmax", log_target=True)
    reduction = "sum" if asked.reduction == "sum" else "rows"
    return replace(asked, reduction=reduction, of_models=True, **changes)


def _check_shapes(recording: Recording, reduction: str) -> None:
    path, arrays = recording.path, recording.arrays
    x, t = arrays["input"], arrays["target"]
    try:
        shape = np.broadcast_shapes(x.shape, t.shape)
    except ValueError:
        raise ParityError(
            f"{path}: `input` {x.shape} and `target` {t.shape} do not broadcast"
        ) from None
    if 0 in shape:
        raise ParityError(
            f"{path}: `input` {x.shape} and `target` {t.shape} hold no numbers: there "
            "is nothing to compare"
        )
    expected = {
        "loss": shape if reduction == "none" else (),
        "grad_input": x.shape,
        "grad_target": t.shape,
        "mask": shape[:-1],
    }
    for name, wanted in expected.items():
        if name in arrays and arrays[name].shape != wanted:
            if name == "loss" and wanted == () and arrays[name].size == 1:
                continue
            hint = f" with --reduction {reduction}" if name == "loss" else ""
            raise ParityError(
                f"{path}: `{name}` has shape {arrays[name].shape}, "
                f"expected {wanted}{hint}"
            )


def _in_both(recording: Recording, right: Formula) -> tuple[Result, ...]:
    x, t = recording.arrays["input"], recording.arrays["target"]
    more = [np.ones(1)]
    function, options = "gradients", {"log_target": right.log_target}
    reduction = right.reduction
    if right.of_models:
        function, options = "distillation", {"temperature": right.temperature}
        reduction = "sum" if reduction == "sum" else "mean"
        more += [recording.arrays["mask"]] if right.masked else []
    case = Case(
        "compare",
        recording.path,
        function,
        lambda: (x, t, *more),
        (),
        dict(reduction=reduction, **options),
        (x.dtype.name, t.dtype.name),
    )
    return tuple(compare_cases([case]))


class Evaluated:
    """What a formula gives, in float64, for the quantities that were recorded."""

    def __init__(self, formula: Formula, arrays: Arrays) -> None:
        self.formula, self.arrays = formula, arrays
        self.names = [name for name in ("loss", *GRADIENTS) if name in arrays]
        self.values: Arrays = {}
        self.sizes: Arrays = {}
        x, t = (jnp.asarray(arrays[n], jnp.float64) for n in ("input", "target"))
        mask = jnp.asarray(arrays["mask"], bool) if "mask" in arrays else None
        with jax.numpy_rank_promotion("allow"):
            if "loss" in arrays:
                loss, size = formula(x, t, mask)
                self.values["loss"] = np.asarray(loss)
                self.sizes["loss"] = np.asarray(size)
            if arrays.keys() & {*GRADIENTS}:
                total = lambda x, t: jnp.sum(formula(x, t, mask)[0])
                gradients = jax.grad(total, (0, 1))(x, t)
                for name, gradient in zip(GRADIENTS, gradients, strict=True):
                    size = np.where(np.isfinite(gradient), np.abs(gradient), 0)
                    self.values[name] = np.asarray(gradient)
                    self.sizes[name] = np.max(size)

    def agrees(self, name: str) -> bool:
        """Whether the recording has this value, up to rounding."""
        recorded, value = self.arrays[name].astype(np.float64), self.values[name]
        dtypes = {self.arrays[n].dtype for n in ("input", "target", name)}
        eps = max(float(jnp.finfo(d).eps) for d in dtypes)
        # A sum is in float32 at least, and its rounding errors add up as a random walk.
        summed = name == "loss" and value.ndim == 0
        terms = self.arrays["input"].size if summed else 1
        tol = 4 * eps + math.sqrt(terms) * min(eps, float(np.finfo(np.float32).eps))
        recorded = recorded.reshape(value.shape)
        with np.errstate(invalid="ignore"):
            near = np.abs(recorded - value) <= tol * self.sizes[name]
        return bool(np.where(np.isfinite(value), near, equal(recorded, value)).all())

    def explains(self) -> bool:
        """Whether everything that was recorded comes from this formula."""
        return all(map(self.agrees, self.names))


def _explanations(truth: Evaluated, recorded: tuple[Recorded, ...]) -> list[Mistake]:
    """The mistakes that explain everything that was recorded: the simplest kind."""
    arrays, right = truth.arrays, truth.formula
    dims = arrays["input"].ndim, arrays["target"].ndim

    def matching(candidates: Candidates) -> list[Mistake]:
        found = []
        for name, formula in candidates:
            wrong = Evaluated(formula, arrays)
            if wrong.explains():
                found.append(Mistake(name, _evidence(truth, wrong, recorded)))
        # The softmax of normalised rows changes nothing, so any other name is better.
        return [m for m in found if "logits" not in m.name] or found[:1]

    return (
        matching(single_mistakes(right, dims))
        or _padded(truth, recorded)
        or matching(double_mistakes(right, dims))
        or matching(at_unknown_temperature(right, dims))
    )


def _padded(truth: Evaluated, recorded: tuple[Recorded, ...]) -> list[Mistake]:
    """Without a mask, the recording may leave out the rows whose target is 0."""
    arrays, right = truth.arrays, truth.formula
    t = arrays["target"]
    kept = np.any(t != 0, -1) if t.ndim == arrays["input"].ndim > 1 else np.ones(())
    if "mask" in arrays or kept.all() or right.reduction not in ("mean", "batchmean"):
        return []
    if not Evaluated(right, arrays | {"mask": kept}).explains():
        return []
    rows = f"the {int(kept.sum())} of {kept.size} rows whose target is not 0"
    evidence = f"the recording is a mean over {rows}; {right} is over all"
    if recorded[0].name == "loss":
        evidence += _relation(*_numbers(recorded[0]), "; ")
    return [Mistake("mean over padding", evidence)]


def _evidence(
    truth: Evaluated, wrong: Evaluated, recorded: tuple[Recorded, ...]
) -> str:
    lines = []
    for r in recorded:
        if r.agrees:
            continue
        if r.name != "loss":
            lines.append(f"`{r.name}` is the gradient of {wrong.formula}")
        elif r.expected.ndim:
            lines.append(f"`loss` is {wrong.formula}")
        else:
            got, right = _numbers(r)
            lines.append(
                f"recorded {got:.7g} = {float(wrong.values['loss']):.7g} = "
                f"{wrong.formula}; right: {right:.7g} = {truth.formula}"
                f"{_relation(got, right)}"
            )
            if wrong.formula.cross_entropy:
                lines.append(
                    f"the difference, {got - right:.7g}, is the entropy of target"
                )
    return "; ".join(lines)


def _unknown(recorded: tuple[Recorded, ...]) -> Mistake:
    """No known mistake; but the ratio of the losses may be the square of a T."""
    name, loss = "none of the known mistakes", recorded[0]
    if loss.name != "loss" or loss.agrees or loss.expected.ndim:
        return Mistake(name, "")
    got, right = _numbers(loss)
    evidence = f"recorded {got:.7g}, right {right:.7g}{_relation(got, right)}"
    square = got / right if right else math.nan
    for ratio, verb in ((square, "times"), (1 / (square or math.nan), "over")):
        root = math.sqrt(ratio) if 1 < ratio < math.inf else 0
        # Temperatures are usually multiples of a quarter.
        if root and abs(4 * root - round(4 * root)) < 1e-4 * root:
            name = "T² (give the temperature to be sure)"
            return Mistake(name, f"{evidence}: right {verb} {root:.6g}²")
    return Mistake(name, evidence)


def _numbers(loss: Recorded) -> tuple[float, float]:
    """The recorded scalar and the right one."""
    return float(loss.recorded.item()), float(loss.expected)


def _relation(got: float, right: float, separator: str = ", ") -> str:
    if not (math.isfinite(got) and math.isfinite(right)):
        return ""
    if got == 0:
        return f"{separator}recorded - right = {got - right:.7g}"
    return f"{separator}right / recorded = {right / got:.7g}"
