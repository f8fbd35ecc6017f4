"""Makes PyTorch peers, eager and compiled, on the same arrays."""

from functools import partial

from .harness import Peer, Work


def torch_work(f, arrays, with_gradient, compile):
    """Runs `f` on these NumPy arrays, with gradients of the first `with_gradient`."""
    import torch

    inputs = [torch.from_numpy(array) for array in arrays]
    for x in inputs[:with_gradient]:
        x.requires_grad_()
    if compile:
        torch._dynamo.reset()  # forgets other cells' shapes
        f = torch.compile(f, dynamic=False)

    def run():
        if not with_gradient:
            with torch.no_grad():
                return f(*inputs).numpy(), []
        value = f(*inputs)
        gradients = torch.autograd.grad(value, inputs[:with_gradient])
        return value.detach().numpy(), [x.numpy() for x in gradients]

    return Work(run)


def torch_peers(make_loss, arrays, with_gradient, expected):
    """Makes peers. `make_loss()` imports torch, so a missing torch skips the peer."""

    def prepare(compile):
        return torch_work(make_loss(), arrays, with_gradient, compile)

    return [
        Peer("torch eager", partial(prepare, False), expected),
        Peer("torch.compile", partial(prepare, True), expected),
    ]
