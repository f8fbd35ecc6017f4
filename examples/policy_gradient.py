# `make run ARGS="examples/policy_gradient.py"` builds an environment and runs this.
"""On-policy distillation of a bigram language model, from tokens that it samples.

The student writes sequences, and is rewarded for each token by the teacher's advantage,
`log p - log q`. The policy gradient needs the log-probabilities of the sampled tokens
alone. The second step on the same samples is corrected by importance ratios. Both
models are so small that the KL between them is known, and not only estimated.
"""

import argparse
import math
import sys

import jax
import jax.numpy as jnp
import optax

import jaxkl


def draw(key, kernel, sequences, length):
    """Sequences of a model, `[sequences, 1 + length]`, from tokens drawn evenly."""
    first, rest = jax.random.split(key)
    start = jax.random.randint(first, (sequences,), 0, kernel.shape[1])

    def step(token, key):
        token = jax.random.categorical(key, kernel[token])
        return token, token

    _, tokens = jax.lax.scan(step, start, jax.random.split(rest, length))
    return jnp.concatenate([start[None], tokens]).T


def model(kernel, tokens):
    """The logits after each token but the last: a head of one-hot hidden states."""
    hidden = jax.nn.one_hot(tokens[:, :-1], kernel.shape[0])
    return jaxkl.LinearHead(hidden, kernel)


def log_probs(kernel, tokens):
    return jaxkl.token_log_probs(model(kernel, tokens), tokens[:, 1:])


def policy_loss(kernel, tokens, old_log_q, log_p):
    """Its gradient is that of the reverse KL at each place, in expectation.

    At the first step on the samples the ratio is 1, with the gradient of `log q`.
    """
    log_q = log_probs(kernel, tokens)
    advantage = jax.lax.stop_gradient(log_p - log_q)
    return -jnp.mean(jnp.exp(log_q - old_log_q) * advantage)


@jax.jit
def estimates(key, kernel, teacher):
    """The reverse KL at the places of samples: exact, and by k1 and k3 (Schulman)."""
    tokens = draw(key, kernel, 256, 64)
    models = model(kernel, tokens), model(teacher, tokens)
    exact = jaxkl.distillation_loss(
        *models, divergence=jaxkl.ReverseKL(), reduction="none"
    )
    r = log_probs(teacher, tokens) - log_probs(kernel, tokens)
    each = jnp.stack([exact, -r, jnp.expm1(r) - r])
    return jnp.mean(each, axis=(1, 2)), jnp.std(each, axis=(1, 2))


def train(args):
    """The student's kernels before and after, and the teacher's."""
    keys = jax.random.split(jax.random.key(args.seed), 3)
    shape = args.vocab, args.vocab
    student, teacher = (jax.random.normal(key, shape) for key in keys[:2])
    optimizer = optax.adam(args.learning_rate)

    @jax.jit
    def update(kernel, state, key):
        tokens = draw(key, kernel, args.sequences, args.length)
        old_log_q, log_p = log_probs(kernel, tokens), log_probs(teacher, tokens)
        for _ in range(2):
            grad = jax.grad(policy_loss)(kernel, tokens, old_log_q, log_p)
            updates, state = optimizer.update(grad, state)
            kernel = optax.apply_updates(kernel, updates)
        return kernel, state

    kernel, state = student, optimizer.init(student)
    for key in jax.random.split(keys[2], args.steps):
        kernel, state = update(kernel, state, key)
    return student, kernel, teacher


def number(convert, accept, expected):
    """Makes an argparse type that converts the text and checks it with `accept`."""

    def parse(text):
        try:
            if accept(value := convert(text)):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

    return parse


def main():
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=style
    )
    count = number(int, lambda n: n >= 1, "an integer from 1")
    several = number(int, lambda n: n >= 2, "an integer from 2")
    positive = number(float, lambda x: 0 < x < math.inf, "a number above 0")
    for name, default, convert, text in (
        ("vocab", 32, several, "tokens of the language"),
        ("sequences", 64, count, "sequences of a step"),
        ("length", 32, count, "sampled tokens of a sequence"),
        ("steps", 60, count, "steps, each of two updates"),
        ("learning-rate", 0.05, positive, "of Adam"),
        ("seed", 0, number(int, lambda n: n >= 0, "an integer from 0"), "of all draws"),
    ):
        parser.add_argument(f"--{name}", type=convert, default=default, help=text)
    args = parser.parse_args()
    # By default JAX multiplies float32 matrices in lower precision on a GPU or TPU.
    jax.config.update("jax_default_matmul_precision", "highest")

    before, after, teacher = train(args)
    print("KL(student ‖ teacher) in nats, at 16384 places that the student sampled:")
    print("           exact       k1       k3    deviation of a sample: k1       k3")
    exact = []
    for name, kernel in (("before", before), ("after", after)):
        mean, deviation = estimates(jax.random.key(args.seed + 1), kernel, teacher)
        exact.append(mean[0])
        numbers = "".join(f"{x:9.4f}" for x in mean)
        print(f"{name:7}{numbers}{deviation[1]:29.4f}{deviation[2]:9.4f}")
    if not exact[1] < exact[0]:
        sys.exit("The student did NOT come nearer to its teacher.")
    print(f"{100 * (1 - exact[1] / exact[0]):.1f} % of the KL is gone.")


if __name__ == "__main__":
    main()
