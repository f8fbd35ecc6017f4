"""A user's own arrays in both frameworks, and beside what was recorded."""

import dataclasses
import math
import warnings
from typing import Any

import jax
import numpy as np

from ._cases import Case
from ._contents import nans, wrong_contents
from ._errors import ParityError, require_torch
from ._evaluate import Evaluated
from ._files import Recording
from ._formula import check_temperature, Formula
from ._mistakes import at_unknown_temperature, double_mistakes, single_mistakes
from ._run import compare_cases, Result


@dataclasses.dataclass(frozen=True)
class Recorded:
    """One recorded quantity beside its right value."""

    name: str  # "loss", "grad_input" or "grad_target"
    recorded: Any
    expected: Any
    agrees: bool


@dataclasses.dataclass(frozen=True)
class Mistake:
    name: str
    evidence: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All that is to be said of one file."""

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
    the file has a `temperature`; over the rows of the `mask` if it has one, in the
    count too.

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
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _check_shapes(recording, reduction)
        both = _in_both(recording, reduction, log_target)
        recorded, found = _recorded(recording, right)
        bad = nans(arrays)
        if not (found or bad or all(r.agrees for r in recorded)):
            found = (_unknown(recorded),)
        bad += wrong_contents(arrays, log_target)
        found = (*(Mistake(*b) for b in bad), *found)
    shown = {k: f"{v.dtype}{list(v.shape)}" for k, v in arrays.items()}
    return Comparison(recording.path, right, shown, both, recorded, found)


def _check_shapes(recording, reduction):
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


def _in_both(recording, reduction, log_target):
    x, t = recording.arrays["input"], recording.arrays["target"]
    case = Case(
        "compare",
        recording.path,
        "gradients",
        lambda: (x, t, np.ones(1)),
        (),
        dict(reduction=reduction, log_target=log_target),
        (x.dtype.name, t.dtype.name),
    )
    return tuple(compare_cases([case]))


def _recorded(recording, right):
    """What was recorded, and the mistakes that explain all of it."""
    arrays = recording.arrays
    names = {n for n in ("loss", "grad_input", "grad_target") if n in arrays}
    if not names:
        return (), ()
    truth = Evaluated(right, arrays, names)
    recorded = tuple(
        Recorded(n, arrays[n], truth.values[n], truth.agrees(n, arrays))
        for n in ("loss", "grad_input", "grad_target")
        if n in names
    )
    if all(r.agrees for r in recorded):
        return recorded, ()
    shape = np.broadcast_shapes(arrays["input"].shape, arrays["target"].shape)
    about = right, len(shape)
    tiers = [single_mistakes(*about), double_mistakes(*about)]
    if right.temperature == 1:
        tiers.append(at_unknown_temperature(right))
    # Pairs only if no mistake explains the recording alone.
    for candidates in tiers:
        found = []
        for name, formula in candidates:
            wrong = Evaluated(formula, arrays, names)
            if all(wrong.agrees(n, arrays) for n in names):
                found.append(Mistake(name, _evidence(truth, wrong, recorded)))
        # The softmax of what is normalised changes nothing.
        found = [m for m in found if "logits" not in m.name] or found[:1]
        found = found or _padded(arrays, right, truth, recorded)
        if found:
            return recorded, tuple(found)
    return recorded, ()


def _padded(arrays, right, truth, recorded):
    """Without a mask: the recording may leave out rows whose target is 0."""
    t = arrays["target"]
    kept = np.any(t != 0, -1) if t.ndim == arrays["input"].ndim > 1 else np.ones(())
    if "mask" in arrays or kept.all() or right.reduction not in ("mean", "batchmean"):
        return []
    masked = arrays | {"mask": kept}
    found = Evaluated(right, masked, {r.name for r in recorded})
    if not all(found.agrees(r.name, masked) for r in recorded):
        return []
    rows = f"the {int(kept.sum())} of {kept.size} rows whose target is not 0"
    evidence = f"the recording is a mean over {rows}; {truth.formula} is over all"
    loss = next((r for r in recorded if r.name == "loss"), None)
    if loss:
        evidence += _relation(float(loss.recorded.item()), float(loss.expected), "; ")
    return [Mistake("mean over padding", evidence)]


def _evidence(truth, wrong, recorded):
    lines = []
    for r in recorded:
        if r.agrees:
            continue
        value, right = wrong.values[r.name], truth.values[r.name]
        if r.name != "loss":
            lines.append(f"`{r.name}` is the gradient of {wrong.formula}")
        elif value.ndim:
            lines.append(f"`loss` is {wrong.formula}")
        else:
            got, right = float(r.recorded.item()), float(right)
            lines.append(
                f"recorded {got:.7g} = {float(value):.7g} = {wrong.formula}; right: "
                f"{right:.7g} = {truth.formula}{_relation(got, right)}"
            )
            if wrong.formula.cross_entropy:
                lines.append(
                    f"the difference, {got - right:.7g}, is the entropy of target"
                )
    return "; ".join(lines)


def _relation(got, right, separator=", "):
    if not (math.isfinite(got) and math.isfinite(right)):
        return ""
    if got == 0:
        return f"{separator}recorded - right = {got - right:.7g}"
    return f"{separator}right / recorded = {right / got:.7g}"


def _unknown(recorded):
    for r in recorded:
        if r.name == "loss" and r.expected.ndim == 0 and not r.agrees:
            got, right = float(r.recorded.item()), float(r.expected)
            text = f"recorded {got:.7g}, right {right:.7g}{_relation(got, right)}"
            square = got / right if right else math.nan
            for ratio, verb in ((square, "times"), (1 / (square or math.nan), "over")):
                root = math.sqrt(ratio) if ratio > 1 else 0
                if root and abs(4 * root - round(4 * root)) < 1e-4 * root:
                    name = "T² (give the temperature to be sure)"
                    return Mistake(name, f"{text}: right {verb} {root:.6g}²")
            return Mistake("none of the known mistakes", text)
    return Mistake("none of the known mistakes", "")
