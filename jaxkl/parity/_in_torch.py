"""What the battery computes, in PyTorch. A report quotes these functions."""

import warnings

import numpy as np
import torch


def torch_gradients(x, t, g, **options):
    x, t = x.requires_grad_(), t.requires_grad_()
    value = torch.nn.functional.kl_div(x, t, **options)
    g = torch.tensor(np.resize(g, value.shape), dtype=value.dtype)
    d_input, d_target = torch.autograd.grad(value, (x, t), g)
    return {"value": value, "d_input": d_input, "d_target": d_target}


def torch_second_order(x, t, g, c_input, c_target, **options):
    x, t = x.requires_grad_(), t.requires_grad_()
    value = torch.nn.functional.kl_div(x, t, **options)
    g = torch.tensor(np.resize(g, value.shape), dtype=value.dtype, requires_grad=True)
    gradients = torch.autograd.grad(value, (x, t), g, create_graph=True)
    c = torch.tensor(c_input, dtype=x.dtype), torch.tensor(c_target, dtype=t.dtype)
    d_input, d_target, d_g = torch.autograd.grad(
        gradients, (x, t, g), c, materialize_grads=True
    )
    return {"d2_input": d_input, "d2_target": d_target, "d2_g": d_g}


def torch_call(x, t, *, module, arguments):
    built = 0
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            if module:
                loss = torch.nn.KLDivLoss(*arguments)
                built = len(seen)
                value = loss(x, t)
            else:
                value = torch.nn.functional.kl_div(x, t, *arguments)
        except Exception:
            return {"outcome": "error"}
    outcome = f"warnings: {built} of the constructor, {len(seen) - built} of the call"
    return {"outcome": outcome, "value": value}
