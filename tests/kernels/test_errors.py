"""What a wrong argument meets: one sentence that says what was got, what is expected and how to get there."""

import pytest
import torch

from cases import inputs
from selfnpo_kernels import cfg_combine, forward_jump, fused_adamw_, guided_step, philox_normal, tweedie, x0_loss

NAN = float("nan")
META = torch.device("meta")


def big():
    return torch.empty(1, device=META).expand(1, 2**34 + 1)


CALLS = {
    "rows": (lambda t: tweedie(t.sample, t.cond, t.rows), r"tweedie got rows of shape \(3, 4\); expected \(3, 2\)"),
    "one row": (lambda t: guided_step(t.sample, t.cond, None, 1.0, t.rows[:1]), r"rows.expand\(3, -1\)"),
    "integer rows": (lambda t: tweedie(t.sample, t.cond, t.rows[:, :2].long()), "rows of torch.int64; expected floating"),
    "rows with gradient": (lambda t: tweedie(t.sample, t.cond, t.rows[:, :2].requires_grad_()), r"rows.detach\(\)"),
    "rows elsewhere": (lambda t: tweedie(t.sample, t.cond, t.rows[:, :2].to(META)), "rows on meta and sample on cpu; move"),
    "devices": (lambda t: tweedie(t.sample, t.cond.to(META), t.rows[:, :2]), "model_output on meta and sample on cpu"),
    "shape": (lambda t: tweedie(t.sample, t.cond[:2], t.rows[:, :2]), r"model_output of shape \(2, 4, 5\).*\(3, 4, 5\)"),
    "integer sample": (lambda t: tweedie(t.sample.long(), t.cond, t.rows[:, :2]), r"sample of torch.int64.*e.float\(\)"),
    "sparse": (lambda t: tweedie(t.sample.to_sparse(), t.cond, t.rows[:, :2]), r"expected a dense tensor.*to_dense"),
    "no dimensions": (lambda t: tweedie(torch.tensor(1.0), t.cond, t.rows[:, :2]), "without dimensions"),
    "nan scale": (lambda t: guided_step(t.sample, t.cond, t.uncond, NAN, t.rows), "guidance_scale = nan; expected a finite"),
    "scale tensor": (
        lambda t: guided_step(t.sample, t.cond, t.uncond, torch.ones(2), t.rows),
        "guidance_scale as a torch.float32 tensor of 2 elements on cpu; expected one torch.float32 element on cpu",
    ),
    "scale gradient": (
        lambda t: guided_step(t.sample, t.cond, t.uncond, torch.tensor(2.0, requires_grad=True), t.rows),
        r"guidance_scale.detach\(\)",
    ),
    "odd batch": (lambda t: cfg_combine(t.sample, 2.0), r"\(3, 4, 5\); expected \[negative; positive\], an even batch"),
    "nan cfg scale": (lambda t: cfg_combine(t.batched, NAN), "guidance_scale = nan"),
    "nan rescale": (lambda t: cfg_combine(t.batched, 2.0, NAN), "guidance_rescale = nan; expected a finite number"),
    "ids": (lambda t: forward_jump(t.sample, t.rows[:, :2], 0, 0, t.ids[:2]), r"sample_ids \(2,\).*one id per sample"),
    "float ids": (lambda t: forward_jump(t.sample, t.rows[:, :2], 0, 0, t.ids.float()), "torch.float32.*torch.int64"),
    "ids elsewhere": (lambda t: forward_jump(t.sample, t.rows[:, :2], 0, 0, t.ids.to(META)), "sample_ids on meta"),
    "seed": (lambda t: forward_jump(t.sample, t.rows[:, :2], -1, 0, t.ids), r"seed = -1; expected 0 <= seed < 2\^64"),
    "step": (lambda t: forward_jump(t.sample, t.rows[:, :2], 0, 2**32, t.ids), r"step = 4294967296; expected 0 <= step"),
    "site": (lambda t: forward_jump(t.sample, t.rows[:, :2], 0, 0, t.ids, -3), "site = -3"),
    "seed tensor": (lambda t: forward_jump(t.sample, t.rows[:, :2], torch.tensor(1.0), 0, t.ids), "one torch.int64 element"),
    "s before t": (lambda t: forward_jump(t.sample, t.rows[:, :2] * NAN, 0, 0, t.ids), "NaN in rows: a negative variance"),
    "overflow": (
        lambda t: forward_jump(big(), t.rows[:1, :2].to(META), 0, 0, t.ids[:1].to(META)),
        r"17179869185 elements per sample; the noise counts up to 2\^34",
    ),
    "noise overflow": (lambda t: philox_normal((1, 2**34 + 1), 0), r"counts up to 2\^34"),
    "noise shape": (lambda t: philox_normal((), 0), "an empty shape"),
    "noise dtype": (lambda t: philox_normal((3,), 0, dtype=torch.int64), "dtype torch.int64"),
    "noise ids": (lambda t: philox_normal((3, 4), 0, 0, 0, t.ids[:2]), "one id per sample"),
    "kind": (lambda t: x0_loss(t.cond, t.sample, t.target, t.rows[:, :3], "l1"), "kind 'l1'; expected 'l2' or 'huber'"),
    "huber_c": (lambda t: x0_loss(t.cond, t.sample, t.target, t.rows[:, :3], "huber", 0.0), "huber_c = 0.0; expected a pos"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_argument_is_named(name):
    call, message = CALLS[name]
    with pytest.raises(ValueError, match=message):
        call(inputs((3, 4, 5)))


def adamw(**change):
    tensors = {name: [torch.zeros(3, 4)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    fused_adamw_(**(tensors | {"step": torch.tensor(1), "lr": torch.tensor(0.1)} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": []}, "0 grads for 1 params"),
        ({"grads": [torch.zeros(4, 3)]}, r"grads as torch.float32 \(4, 3\) on cpu; expected torch.float32 \(3, 4\)"),
        ({"grads": [torch.zeros(3, 4, dtype=torch.float64)]}, "grads of torch.float64"),
        ({"params": [torch.zeros(3, 4).bfloat16()]}, "params as torch.bfloat16.*expected torch.float32"),
        ({"lows": [torch.zeros(3, 4).short()]}, "params as torch.float32.*expected torch.bfloat16"),
        ({"emas": [torch.zeros(3, 4)], "ema_lows": [torch.zeros(3, 4).short()]}, "ema_lows exactly where lows is"),
        (
            {"exp_avgs": [torch.zeros(4, 3).T]},
            r"one of exp_avgs with strides \(1, 3\) for a parameter \(3, 4\) with strides \(4, 1\)",
        ),
        (
            {name: [torch.zeros(3, 1).expand(3, 4)] for name in ("params", "exp_avgs", "exp_avg_sqs")},
            "row-major or channels last",
        ),
        ({"step": torch.tensor(1.0)}, "step as torch.float32.*expected one torch.int64"),
        ({"step": torch.tensor(0)}, "step = 0; expected 1 or more"),
        ({"lr": torch.zeros(2)}, r"lr as torch.float32 \(2,\)"),
    ],
)
def test_a_wrong_argument_of_the_optimizer_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        adamw(**change)
