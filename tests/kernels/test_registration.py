"""The ops as PyTorch sees them: schemas, fake tensors, autograd, torch.compile without a graph break."""

import pytest
import torch
import torch._dynamo.testing
from torch.utils._pytree import tree_map_only

import selfnpo_kernels
from cases import LAYOUTS, OPERANDS, OPS, inputs
from selfnpo_kernels import forward_jump, fused_adamw_, guided_step, philox_normal, x0_loss

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def registered(t):
    """(op, arguments) of every registered op."""
    ops = torch.ops.selfnpo
    step, lr = torch.tensor(1), torch.tensor(0.1)
    params, grads, first, second, emas = ([torch.rand(5), torch.rand(2, 3)] for _ in range(5))
    halves = [selfnpo_kernels.split_weights(param) for param in (torch.rand(5), torch.rand(2, 3))]
    highs, lows = ([half[k].clone() for half in halves] for k in (0, 1))
    ema_highs, ema_lows = ([half[k].clone() for half in halves] for k in (0, 1))
    settings = (0.9, 0.999, 1e-8, 0.01, 0.99)
    grad = torch.tensor(1.0)
    return {
        "tweedie": (ops.tweedie, (t.sample, t.cond, t.rows[:, :2])),
        "guided_step": (ops.guided_step, (t.sample, t.cond, t.uncond, t.rows, 2.0, None)),
        "guided_step, scale on device": (ops.guided_step, (t.sample, t.cond, t.uncond, t.rows, 0.0, t.scale)),
        "guided_step, no uncond": (ops.guided_step, (t.sample, t.cond, None, t.rows, 1.0, None)),
        "forward_jump": (ops.forward_jump, (t.sample, t.rows[:, :2], t.ids, 5, None, 6, None, 7)),
        "forward_jump, on device": (ops.forward_jump, (t.sample, t.rows[:, :2], t.ids, 0, t.seed, 0, t.step, 7)),
        "philox_normal": (ops.philox_normal, ((3, 5, 7), t.ids, 5, None, 6, None, 7, torch.bfloat16)),
        "cfg_combine": (ops.cfg_combine, (t.batched, 2.0, None, 0.0)),
        "cfg_combine, rescaled": (ops.cfg_combine, (t.batched, 2.0, None, 0.5)),
        "x0_loss": (ops.x0_loss, (t.cond, t.sample, t.target, t.rows[:, :3], "huber", 0.1)),
        "x0_loss_backward": (ops.x0_loss_backward, (grad, t.cond, t.sample, t.target, t.rows[:, :3], "l2", 0.1, 1)),
        "fused_adamw_": (ops.fused_adamw_, (params, grads, first, second, [], emas, [], step, lr, None, *settings)),
        "fused_adamw_, split": (
            ops.fused_adamw_, (highs, grads, first, second, lows, ema_highs, ema_lows, step, lr, grad, *settings)
        ),
    }  # fmt: skip


NAMES = list(registered(inputs((3, 4, 5, 6))))
GRADIENTS = [name for name in NAMES if not name.startswith(("philox", "x0_loss_backward", "fused"))]


def opcheck(name, t, device):
    op, arguments = registered(t)[name]
    arguments = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), arguments)
    torch.library.opcheck(op.default, arguments, test_utils=CHECKS)


@LAYOUTS
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, layout, device):
    opcheck(name, inputs((3, 4, 5, 6), device=device, layout=layout), device)


@pytest.mark.parametrize("name", GRADIENTS)
def test_opcheck_with_gradients(name, device):
    t = inputs((3, 4, 5, 6), device=device)
    for operand in OPERANDS:
        getattr(t, operand).requires_grad_()
    opcheck(name, t, device)


@LAYOUTS
def test_every_op_compiles_in_one_graph(layout, device):
    def everything(t):
        return [out for name in OPS if not name.startswith("gradient") for out in OPS[name](selfnpo_kernels, t)]

    t = inputs((3, 4, 8, 6), torch.bfloat16, device, layout)
    compiled = torch.compile(everything, fullgraph=True)(t)
    for ours, eager in zip(compiled, everything(t), strict=True):
        assert ours.equal(eager)
        assert ours.stride() == eager.stride()


def test_a_training_step_compiles_in_one_graph_and_follows_the_step():
    t = inputs((3, 4, 8, 6))
    weight = torch.nn.Parameter(torch.ones(6))
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")

    def loss(step):
        x_s = forward_jump(t.sample, t.rows[:, :2], 3, step, t.ids)
        _, target = guided_step(t.sample, t.cond, t.uncond, 2.0, t.rows)
        return x0_loss(x_s * weight, x_s, target, t.rows[:, :3], "huber", 0.1)

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for step in range(5):
        results = []
        for function in (compiled, loss):
            weight.grad = None
            value = function(step)
            value.backward()
            results.append((value.detach(), weight.grad))
        torch.testing.assert_close(*results)
    assert counter.frame_count <= 2  # once for a number, once for any number


def test_the_optimizer_compiles_in_one_graph():
    params, grads, first, second = ([torch.rand(7)] for _ in range(4))
    step, lr = torch.tensor(1), torch.tensor(0.1)
    twin = [[tensor.clone() for tensor in tensors] for tensors in (params, grads, first, second)]

    def update(params, grads, first, second):
        fused_adamw_(params, [grad * 2 for grad in grads], first, second, step=step, lr=lr)

    torch.compile(update, fullgraph=True)(params, grads, first, second)
    update(*twin)
    torch.testing.assert_close(params, twin[0])
    torch.testing.assert_close(second, twin[3])


def test_meta_tensors_have_shapes():
    t = inputs((2, 3, 4), device="meta")
    prev_sample, _ = guided_step(t.sample, t.cond, None, 1.0, t.rows)
    assert prev_sample.shape == (2, 3, 4)
    assert philox_normal((2, 3), 1, device="meta").device.type == "meta"
    assert x0_loss(t.cond, t.sample, t.target, t.rows[:, :3]).shape == ()
