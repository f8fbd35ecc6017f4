# `make run ARGS="examples/from_pytorch.py"` builds an environment and runs this.
"""Runs the same distillation step in PyTorch and in JAX, and checks that they agree.

1. A small student trains for a few steps of SGD at T = 2, with the same weights and
   data in both. PyTorch uses the usual idiom. JAX uses the same idiom with
   `jaxkl.kl_div`, and then `jaxkl.distillation_loss`, which takes the logits.
2. Old snippets still work: `KLDivLoss(reduce=False)`, and a (M, C, W, H) input.
3. `kl_div` differs from binary cross-entropy.

The program exits with 1 if anything differs by more than float32 rounding, and with 2
if PyTorch is missing.
"""

import sys
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jaxkl


try:
    import torch
    import torch.nn.functional as F
except ImportError:
    print(
        "from_pytorch.py needs PyTorch beside JAX. Install it with\n"
        '  pip install "torch==2.13.0"',
        file=sys.stderr,
    )
    sys.exit(2)

T, STEPS, LEARNING_RATE = 2.0, 5, 0.5
BATCH, WIDTHS = 32, (20, 16, 10)
# Relative to the largest entry: a few hundred roundings of float32, of 6e-8 each.
TOLERANCE = 1e-5

failures = []


def difference(expected, actual, what):
    """Returns the largest relative difference, and records it if it is too large."""
    expected, actual = (np.asarray(x, np.float64) for x in (expected, actual))
    if expected.shape != actual.shape:
        failures.append(f"{what}: shape {expected.shape} and {actual.shape}")
        return float("inf")
    scale = max(np.abs(expected).max(), np.finfo(np.float32).tiny)
    worst = float(np.abs(expected - actual).max() / scale)
    if not worst <= TOLERANCE:  # NaN fails too
        failures.append(f"{what}: relative difference {worst:.1e}")
    return worst


# --- 1. A training step ---------------------------------------------------------------


def torch_step(student, x, teacher_logits):
    logits = student(x)
    loss = T**2 * F.kl_div(
        F.log_softmax(logits / T, dim=-1),
        F.softmax(teacher_logits / T, dim=-1),
        reduction="batchmean",
    )
    student.zero_grad()
    loss.backward()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter -= LEARNING_RATE * parameter.grad
    return loss.item(), [parameter.grad.numpy() for parameter in student.parameters()]


def forward(params, x):
    hidden = jax.nn.relu(x @ params["kernel1"] + params["bias1"])
    return hidden @ params["kernel2"] + params["bias2"]


def kl_div_loss(params, x, teacher_logits):
    return T**2 * jaxkl.kl_div(
        jax.nn.log_softmax(forward(params, x) / T),
        jax.nn.softmax(teacher_logits / T),
        reduction="batchmean",
    )


def distillation_loss(params, x, teacher_logits):
    return jaxkl.distillation_loss(forward(params, x), teacher_logits, temperature=T)


@partial(jax.jit, static_argnames="loss_fn")
def jax_step(params, x, teacher_logits, loss_fn):
    loss, grads = jax.value_and_grad(loss_fn)(params, x, teacher_logits)
    params = jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, grads)
    return params, loss, grads


def training():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCH, WIDTHS[0]), np.float32)
    teacher_logits = 3 * rng.standard_normal((BATCH, WIDTHS[-1]), np.float32)
    torch.manual_seed(0)
    student = torch.nn.Sequential(
        torch.nn.Linear(WIDTHS[0], WIDTHS[1]),
        torch.nn.ReLU(),
        torch.nn.Linear(WIDTHS[1], WIDTHS[2]),
    )
    names = ("kernel1", "bias1", "kernel2", "bias2")

    def from_torch(arrays):  # from [out, in] to [in, out]
        return {name: array.T for name, array in zip(names, arrays, strict=True)}

    # Copy, because PyTorch updates its weights in place and JAX may share their memory.
    weights = [p.detach().numpy().copy() for p in student.parameters()]
    start = jax.tree.map(jnp.array, from_torch(weights))
    params = {kl_div_loss: start, distillation_loss: start}

    print(f"Distillation at T = {T:g}, {STEPS} steps of SGD, each library on its own")
    print("step      torch   jaxkl.kl_div   distillation_loss   gradients differ by")
    grads = {}
    for step in range(1, STEPS + 1):
        loss, torch_grads = torch_step(student, *map(torch.tensor, (x, teacher_logits)))
        torch_grads = from_torch(torch_grads)
        losses, worst = [], 0.0
        for fn in params:
            params[fn], jax_loss, grads[fn] = jax_step(
                params[fn], x, teacher_logits, loss_fn=fn
            )
            losses.append(float(jax_loss))
            difference(loss, jax_loss, f"step {step}, {fn.__name__}")
            for name in names:
                what = f"step {step}, gradient of {fn.__name__} to {name}"
                found = difference(torch_grads[name], grads[fn][name], what)
                worst = max(worst, found)
        print(f"{step:4}{loss:11.6f}{losses[0]:15.6f}{losses[1]:20.6f}{worst:22.1e}")

    print("\nFirst entry of each gradient in the last step")
    print("              torch   jaxkl.kl_div   distillation_loss")
    for name in names:
        first = torch_grads[name].flat[0]
        others = [float(grads[fn][name].ravel()[0]) for fn in grads]
        print(f"{name:9}{first:+10.6f}{others[0]:+15.6f}{others[1]:+20.6f}")


# --- 2. Old snippets ------------------------------------------------------------------


def side_by_side(what, theirs, ours):
    difference(theirs, ours, what.strip())
    print(f"{what:42}{theirs:12.6f}{ours:12.6f}")


def snippets():
    rng = np.random.default_rng(1)
    logits, target_logits = rng.standard_normal((2, 5, 10)).astype(np.float32)
    log_probs = np.array(jax.nn.log_softmax(logits))
    probs = np.array(jax.nn.softmax(target_logits))
    images, target_images = rng.standard_normal((2, 2, 3, 4, 5)).astype(np.float32)
    log_image = np.array(jax.nn.log_softmax(images, axis=1))
    image = np.array(jax.nn.softmax(target_images, axis=1))

    # Both libraries warn about `reduce` and `size_average`, and that "mean" is not the
    # KL divergence. This function shows just that, so it hides the warnings.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        theirs = torch.nn.KLDivLoss(reduce=False)(
            *map(torch.tensor, (log_probs, probs))
        )
        ours = jaxkl.KLDivLoss(reduce=False)(log_probs, probs)
        theirs, ours = theirs / 5, ours / 5
        their_mean = torch.nn.KLDivLoss(size_average=True, reduce=True)(
            *map(torch.tensor, (log_image, image))
        )
        our_mean = jaxkl.KLDivLoss(size_average=True, reduce=True)(log_image, image)

    per_pixel = jaxkl.kl_div(log_image, image, reduction="sum") / (2 * 4 * 5)

    print("\nOld snippets                                     torch       jaxkl")
    print("KLDivLoss(reduce=False)(log_probs, probs) / 5, of shape", tuple(ours.shape))
    difference(theirs, ours, "KLDivLoss(reduce=False) / batch size")
    side_by_side("  its sum, the KL of the batch", theirs.sum(), ours.sum())
    print("KLDivLoss() on (M, C, W, H) = (2, 3, 4, 5)")
    side_by_side("  the mean over N = M*C*W*H = 120 entries", their_mean, our_mean)
    side_by_side("  the KL of a pixel, C times that", 3 * their_mean, per_pixel)


# --- 3. Beside binary cross-entropy ---------------------------------------------------


def beside_binary_cross_entropy():
    probs = np.array([0.1, 0.5, 0.9], np.float32)
    print("\nkl_div(log p, target) is not binary cross-entropy")
    print("target    p  torch kl_div  jaxkl.kl_div  torch binary_cross_entropy")
    for target in (1.0, 0.0):
        targets = np.full_like(probs, target)
        p, t = torch.tensor(probs), torch.tensor(targets)
        theirs = F.kl_div(p.log(), t, reduction="none")
        bce = F.binary_cross_entropy(p, t, reduction="none")
        ours = jaxkl.kl_div(jnp.log(probs), targets, reduction="none")
        difference(theirs, ours, f"kl_div at target {target:g}")
        # At target 1 both are -log p. At target 0, kl_div is 0, not -log(1 - p).
        expected = bce if target == 1 else np.zeros(3)
        difference(expected, ours, f"kl_div beside cross-entropy at {target:g}")
        for row in zip(probs, theirs, ours, bce, strict=True):
            print(f"{target:6g}{row[0]:5.1f}{row[1]:14.6f}{row[2]:14.6f}{row[3]:28.6f}")


def main():
    # By default JAX multiplies float32 matrices in lower precision on a GPU or TPU.
    jax.config.update("jax_default_matmul_precision", "highest")
    training()
    snippets()
    beside_binary_cross_entropy()
    if failures:
        print("\nNOT the same:", *failures, sep="\n  ")
        sys.exit(1)
    print(f"\nAll the same to {TOLERANCE:g} of the largest entry.")


if __name__ == "__main__":
    main()
