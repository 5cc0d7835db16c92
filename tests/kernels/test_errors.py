"""What a wrong argument meets: one sentence that says what was got, what is expected and how to get there."""

import re

import numpy
import pytest
import torch

import selfnpo_kernels
from cases import inputs
from selfnpo_kernels import cfg_combine, forward_jump, fused_adamw_, guided_step, philox_normal, tweedie, x0_loss

NAN = float("nan")
META = torch.device("meta")


def big():
    return torch.empty(1, device=META).expand(1, 2**34 + 1)


CALLS = {
    "rows": (lambda t: tweedie(t.sample, t.cond, t.rows), r"tweedie got rows of shape \(3, 4\); expected \(3, 2\)"),
    "one row": (lambda t: guided_step(t.sample, t.cond, None, 1.0, t.rows[:1]), r"rows.expand\(3, -1\)"),
    "integer rows": (lambda t: tweedie(t.sample, t.cond, t.rows[:, :2].long()), "rows of torch.int64; expected a float"),
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
    "s before t": (lambda t: forward_jump(t.sample, t.rows[:, :2] * NAN, 0, 0, t.ids), "NaN in rows.* negative variance"),
    "overflow": (
        lambda t: forward_jump(big(), t.rows[:1, :2].to(META), 0, 0, t.ids[:1].to(META)),
        r"17179869185 elements per sample; the noise generator supports up to 2\^34",
    ),
    "noise overflow": (lambda t: philox_normal((1, 2**34 + 1), 0), r"supports up to 2\^34"),
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
        ({"emas": [torch.zeros(3, 4)], "ema_lows": [torch.zeros(3, 4).short()]}, "ema_lows exactly if lows is given"),
        (
            {"exp_avgs": [torch.zeros(4, 3).T]},
            r"one of exp_avgs with strides \(1, 3\) for a parameter \(3, 4\) with strides \(4, 1\)",
        ),
        (
            {name: [torch.zeros(3, 1).expand(3, 4)] for name in ("params", "exp_avgs", "exp_avg_sqs")},
            "row-major or channels last",
        ),
        ({"step": torch.tensor(1.0)}, "step as a torch.float32 tensor.*expected one torch.int64"),
        ({"step": torch.tensor(0)}, "step = 0; expected 1 or more"),
        ({"step": 0}, "step = 0; expected 1 or more"),
        ({"lr": torch.zeros(2)}, "lr as a torch.float32 tensor of 2 elements"),
        ({"params": torch.zeros(3, 4)}, r"params of type Tensor; expected a list of tensors, for example \[params\]"),
        ({"params": iter([torch.zeros(3, 4)])}, r"expected a list of tensors, for example list\(params\)"),
        ({"betas": 0.9}, "betas = 0.9; expected two numbers"),
        ({"betas": (0.9,)}, r"betas = \(0.9,\); expected two numbers"),
    ],
)
def test_a_wrong_argument_of_the_optimizer_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        adamw(**change)


def keywords(op: str) -> dict:
    """A right call of an op, every argument by its name."""
    t = inputs((3, 4, 5))
    noise = {"seed": 1, "step": 2, "site": 3, "sample_ids": t.ids}
    high, low = selfnpo_kernels.split_weights(t.sample)
    halves = {
        "params": [high], "lows": [low], "grads": [t.cond], "exp_avgs": [t.cond], "exp_avg_sqs": [t.cond.square()],
        "emas": [high.clone()], "ema_lows": [low.clone()],
    }  # fmt: skip
    return {
        "tweedie": {"sample": t.sample, "model_output": t.cond, "rows": t.rows[:, :2]},
        "guided_step": {
            "sample": t.sample, "cond": t.cond, "uncond": t.uncond, "guidance_scale": 2.0, "rows": t.rows,
        },
        "forward_jump": {"sample": t.sample, "rows": t.rows[:, :2]} | noise,
        "philox_normal": {"shape": (3, 4), "dtype": torch.float32} | noise,
        "philox_uniform": noise,
        "cfg_combine": {"model_output": t.batched, "guidance_scale": 2.0, "guidance_rescale": 0.5},
        "x0_loss": {
            "model_output": t.cond, "sample": t.sample, "target": t.target, "rows": t.rows[:, :3], "kind": "huber",
            "huber_c": 0.1,
        },
        "fused_adamw_": halves | {"step": 1, "lr": 0.1, "grad_scale": 0.5, "betas": (0.9, 0.99), "eps": 1e-8,
            "weight_decay": 0.1, "ema_decay": 0.9},
        "split_weights": {"weights": t.sample},
        "join_weights": {"high": high, "low": low},
    }[op]  # fmt: skip


OPS = sorted(set(selfnpo_kernels.__all__) - {"backend"})
OPTIONAL = {"uncond", "lows", "emas", "ema_lows", "grad_scale"} | {("philox_normal", "sample_ids")}
ARGUMENTS = [(op, name) for op in OPS for name in keywords(op)]
TENSORS = [(op, name) for op, name in ARGUMENTS if isinstance(keywords(op)[name], torch.Tensor)]
NUMBERS = [(op, name) for op, name in ARGUMENTS if isinstance(keywords(op)[name], int | float)]
LISTS = [(op, name) for op, name in ARGUMENTS if isinstance(keywords(op)[name], list)]


@pytest.mark.parametrize("wrong", ["list", "array", "number", "text", "None"])
@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_what_is_no_tensor_is_named(op, name, wrong):
    right = keywords(op)
    value = right[name]
    array = value.float().numpy()
    right[name] = {"list": value.tolist(), "array": array, "number": 1.0, "text": "tensor", "None": None}[wrong]
    if wrong == "None" and {name, (op, name)} & OPTIONAL:
        getattr(selfnpo_kernels, op)(**right)
        return
    message = f"{op} got {name} of type {type(right[name]).__name__}; expected a tensor"
    with pytest.raises(ValueError, match=message) as caught:
        getattr(selfnpo_kernels, op)(**right)
    if wrong in ("list", "array"):  # the remedy works
        right[name] = torch.as_tensor(right[name]).to(value.dtype)
        assert f"torch.as_tensor({name})" in str(caught.value)
        getattr(selfnpo_kernels, op)(**right)


@pytest.mark.parametrize("wrong", ["2", [2], None, 2j, numpy.ones(2), float("nan"), 10**400])
@pytest.mark.parametrize(("op", "name"), NUMBERS)
def test_what_is_no_number_is_named(op, name, wrong):
    if wrong is None and name in OPTIONAL:
        pytest.skip("None means that there is none")
    with pytest.raises(ValueError, match=rf"{op} got {name} .*; expected ") as caught:
        getattr(selfnpo_kernels, op)(**keywords(op) | {name: wrong})
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("op", "name"), NUMBERS)
def test_numbers_of_numpy_are_numbers(op, name):
    right = keywords(op)
    kind = numpy.int64 if isinstance(right[name], int) else numpy.float32
    getattr(selfnpo_kernels, op)(**right | {name: kind(right[name])})


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, name in NUMBERS if name in ("seed", "step", "site")])
def test_a_fraction_counts_nothing(op, name):
    with pytest.raises(ValueError, match=rf"{op} got {name} = 1.5; expected an integer"):
        getattr(selfnpo_kernels, op)(**keywords(op) | {name: 1.5})


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(("op", "name"), LISTS)
def test_what_is_no_tensor_in_a_list_is_named(op, name, index):
    right = {key: value * 2 if isinstance(value, list) else value for key, value in keywords(op).items()}
    for wrong in (right[name][index].float().numpy(), right[name][index].tolist(), None):
        change = {name: [*right[name][:index], wrong, *right[name][index + 1 :]]}
        message = f"got {name}[{index}] of type {type(wrong).__name__}; expected a tensor"
        with pytest.raises(ValueError, match=re.escape(message)):
            getattr(selfnpo_kernels, op)(**right | change)


@pytest.mark.parametrize("shape", [7, "ab", (2.5,), None, [None]])
def test_a_shape_that_is_none_is_named(shape):
    with pytest.raises(ValueError, match=r"philox_normal got shape.*; expected"):
        philox_normal(shape, 0)


def test_the_optimizer_takes_numbers_in_the_place_of_tensors():
    results = []
    for number in (lambda value, dtype: value, lambda value, dtype: torch.tensor(value, dtype=dtype)):
        right = keywords("fused_adamw_")
        scalars = {name: number(value, torch.float32) for name, value in {"lr": 0.1, "grad_scale": 0.5}.items()}
        fused_adamw_(**right | scalars | {"step": number(3, torch.int64)})
        results.append(selfnpo_kernels.join_weights(right["params"][0], right["lows"][0]))
    assert results[0].equal(results[1])


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        (
            "split_weights",
            {"weights": torch.zeros(3).double()},
            "weights of torch.float64; expected torch.float32",
        ),
        ("join_weights", {"low": torch.zeros(3)}, "low of torch.float32; expected torch.int16"),
        ("philox_uniform", {"sample_ids": torch.zeros(2, 2)}, r"sample_ids \(2, 2\) of torch.float32; expected \[B\]"),
        ("philox_normal", {"dtype": "float32"}, "dtype float32; expected a floating-point dtype"),
    ],
)
def test_a_tensor_of_another_kind_is_named(op, change, message):
    with pytest.raises(ValueError, match=message):
        getattr(selfnpo_kernels, op)(**keywords(op) | change)
