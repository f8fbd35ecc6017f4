"""A teacher that is passed first, as Keras has it: a warning where it can be seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec as P

import jaxkl
import jaxkl.reference

from .cases import rarely, rounded


def scanned(f):
    add = lambda total, x: (total + f(*x), None)
    return lambda s, t: jax.lax.scan(add, jnp.float32(0), (s[:, None], t[:, None]))[0]


def sharded(f):
    mesh = Mesh(jax.devices()[:2], ("x",))
    local = lambda s, t: jax.lax.psum(f(s, t), "x")
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("x"), out_specs=P()))


WAYS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "vmap": lambda f: lambda s, t: jax.vmap(f)(s, t).sum(),
    "scan": scanned,
    "remat": jax.checkpoint,
    "shard_map": sharded,
    "everything": lambda f: jax.jit(jax.checkpoint(scanned(jax.jit(f)))),
}
others = [way for name, way in WAYS.items() if name != "everything"]
over_ways = pytest.mark.parametrize(
    "way",
    [WAYS["everything"], *rarely(*others)],
    ids=["everything", *(name for name in WAYS if name != "everything")],
)
MESSAGE = "`teacher` is differentiated and `student` is not.*the student comes first"


@over_ways
@pytest.mark.parametrize("jit", [False, *rarely(True)])
def test_a_differentiated_teacher_and_a_constant_student(rng, way, jit):
    student, teacher = rounded(rng, (4, 5)), rounded(rng, (4, 5))
    f = way(lambda s, t: jaxkl.distillation_loss(t, s))
    grad = jax.grad(f)
    with pytest.warns(UserWarning, match=MESSAGE):
        d_student = (jax.jit(grad) if jit else grad)(student, teacher)
    assert not d_student.any()


@over_ways
def test_the_right_order(rng, way):
    s, t = rounded(rng, (4, 5)), rounded(rng, (4, 5))
    f = way(lambda s, t: jaxkl.distillation_loss(s, t))  # warnings are errors here
    value, (d_s, d_t) = jax.jit(jax.value_and_grad(f, (0, 1)))(s, t)
    assert value > 0 and d_s.any()
    assert not d_t.any()  # a frozen teacher may be among all parameters
    assert jax.jit(jax.jacrev(jax.grad(f)))(s, t).any()
    teacher_alone = way(
        lambda s, t: jaxkl.distillation_loss(s, t, differentiate_teacher=True)
    )
    assert jax.jit(jax.grad(teacher_alone, argnums=1))(s, t).any()
    stopped = way(lambda s, t: jaxkl.distillation_loss(s, jax.lax.stop_gradient(t)))
    assert not jax.jit(jax.grad(stopped, argnums=1))(s, t).any()


def test_heads_and_lists(rng):
    hidden, kernel = rounded(rng, (4, 3)), rounded(rng, (3, 5))
    head, logits = jaxkl.LinearHead(hidden, kernel), rounded(rng, (4, 5))
    grad = jax.grad(lambda x: jaxkl.distillation_loss(logits, x))
    with pytest.warns(UserWarning, match=MESSAGE):
        grad(head)
    frozen = lambda h, t: jaxkl.distillation_loss(jaxkl.LinearHead(h, kernel), t)
    assert jax.grad(frozen)(hidden, logits).any()
    teacher = jaxkl.top_k_teacher(logits, 2)
    listed = lambda s, log_probs: jaxkl.distillation_loss(
        s, jaxkl.SparseTeacher(teacher.indices, log_probs)
    )
    assert jax.grad(listed)(logits, teacher.log_probs).any()
    with pytest.warns(UserWarning, match=MESSAGE):
        jax.grad(listed, argnums=1)(logits, teacher.log_probs)


@pytest.mark.slow
def test_forward_mode(rng):
    s, t = rounded(rng, (4, 5)), rounded(rng, (4, 5))
    loss = jaxkl.reference.distillation_loss
    _, slope = jax.jvp(lambda s: loss(s, t), (s,), (s,))
    _, both = jax.jvp(loss, (s, t), (s, t))
    np.testing.assert_allclose(slope, both, rtol=1e-6)
    with pytest.warns(UserWarning, match=MESSAGE):
        jax.jvp(lambda t: loss(s, t), (t,), (t,))


def test_the_program_is_the_same(rng):
    s, t = rounded(rng, (4, 5)), rounded(rng, (4, 5))
    text = lambda f: jax.jit(f).lower(s, t).as_text()
    stopped = lambda f: lambda s, t: f(s, jax.lax.stop_gradient(t))
    loss = lambda s, t: jaxkl.distillation_loss(s, t)
    grad = lambda f: lambda s, t: jax.grad(f)(s, t)
    name = lambda text: text.replace("stopped", "loss")
    assert name(text(grad(loss))) == name(text(grad(stopped(loss))))
