"""Losses in PyTorch for `benchmarks/gpu.py`: eager, compiled, and Liger's."""

import torch

from . import losses


def loss_of(peer, form, divergence):
    """Makes the usual lines: bfloat16 logits are cast to float32."""
    if peer == "Liger":
        return liger(form, divergence)
    loss = losses.with_torch(divergence)

    def on_logits(student, teacher):
        return loss(student.float(), teacher.float())

    def on_heads(h, k, th, tk):
        with torch.no_grad():
            teacher = th @ tk
        return on_logits(h @ k, teacher)

    f = on_logits if form == "dense" else on_heads
    return torch.compile(f, dynamic=False) if peer == "torch.compile" else f


def liger(form, divergence):
    """Makes Liger's chunked loss, which torch compiles.

    Its generalised Jensen-Shannon divergence is the forward KL at `beta=0` and the
    reverse KL at `beta=1`. It does not multiply by T².
    """
    if form == "dense":
        raise NotImplementedError("its chunked loss takes heads alone")
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    beta = {"forward-kl": 0.0, "reverse-kl": 1.0, "jensen-shannon": 0.5}[divergence]

    def loss(h, k, th, tk):
        labels = torch.zeros(len(h), dtype=torch.int64, device=h.device)  # all count
        value = LigerFusedLinearJSDFunction.apply(
            *(h, k, th, tk, labels, None, None, 0.0, 1.0, beta, -100, losses.T)
        )
        return losses.T**2 * value

    return loss


class Program:
    def __init__(self, peer, form, divergence, options, device):
        if options:
            raise NotImplementedError(f"torch has no options {options}")
        if device == "cuda" and not torch.cuda.is_available():
            raise NotImplementedError("this torch finds no GPU")
        self._loss = loss_of(peer, form, divergence)
        self._gradients = 1 if form == "dense" else 2
        self._device = device
        self.transposed = peer == "Liger"  # whether kernels are [vocab, hidden]

    def outputs_of(self, arrays, dtype):
        self.arguments = [
            torch.from_numpy(x).to(self._device, getattr(torch, dtype)) for x in arrays
        ]
        return self.run()

    def prepare(self, shapes):
        """Draws the arguments; logits have a deviation of 2. Returns facts."""
        torch.manual_seed(0)
        self.arguments = []
        for name, shape in shapes.items():
            x = torch.randn(shape, device=self._device, dtype=torch.bfloat16)
            hidden = shape[1 if self.transposed else 0]
            x *= hidden**-0.5 if name.endswith("kernel") else 2
            self.arguments.append(x)
        return {}

    def run(self):
        inputs = [x.detach() for x in self.arguments]
        wanted = inputs[: self._gradients]
        for x in wanted:
            x.requires_grad_()
        value = self._loss(*inputs)
        return value.detach(), torch.autograd.grad(value, wanted)

    def wait(self, outputs):
        if self._device == "cuda":
            torch.cuda.synchronize()
        return outputs

    def run_for_peak(self):
        """Runs once, after a run that compiles; returns outputs and facts."""
        outputs = self.wait(self.run())
        if self._device == "cpu":
            return outputs, {}
        del outputs
        torch.cuda.reset_peak_memory_stats()
        outputs = self.wait(self.run())
        return outputs, {"peak_bytes": torch.cuda.max_memory_allocated()}

    @staticmethod
    def to_numpy(x):
        return x.detach().cpu().float().numpy()
