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


def torch_distillation(s, t, g, where=None, *, temperature, reduction):
    s, t = s.requires_grad_(), t.requires_grad_()
    wide = torch.promote_types(torch.promote_types(s.dtype, t.dtype), torch.float32)
    log_q, log_p = (torch.log_softmax(x.to(wide) / temperature, -1) for x in (s, t))
    rows = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True)
    rows = temperature**2 * rows.sum(-1)
    if where is not None:
        rows = rows[torch.tensor(where, dtype=torch.bool)]
    value = rows.mean() if reduction == "mean" else rows.sum()
    d_student, d_teacher = torch.autograd.grad(value, (s, t))
    return {"value": value, "d_input": d_student, "d_target": d_teacher}


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
