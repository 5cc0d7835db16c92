"""AdamW for all parameters: clip factor, update, moving average and bfloat16 weights in one pass over memory.

There are two ways to keep float32 master weights for a model that computes in bfloat16. In bytes per parameter and step,
with bfloat16 gradients and a moving average in both precisions too:

                                        plain: float32 + bfloat16 copy      split: bfloat16 high + int16 low half
    gradient, twice (norm, update)      2 + 2                               2 + 2
    moments, read and written           8 + 8                               8 + 8
    weights, read and written           4 + 4, copy 2                       4 + 4, the high half is the copy
    average, read and written           4 + 4, copy 2                       4 + 4, the high half is the copy
    traffic                             40                                  36
    memory                              22                                  18
      (weights, average, gradient, two moments)

The split layout is lossless: the two halves add up to the float32 bits. It saves 10 % of the traffic and 4 bytes of memory,
so it is the one implemented here. Parameters that the model uses in float32 need no copy and are not split.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from selfnpo_kernels import extension, reference
from selfnpo_kernels.dispatch import backend_for
from selfnpo_kernels.operands import check_scalar_tensor, check_tensor, integer, memory_format, number, same_order
from selfnpo_kernels.registration import register


def fused_adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    step: int | Tensor,
    lr: float | Tensor,
    grad_scale: float | Tensor | None = None,
    lows: list[Tensor] | None = None,
    emas: list[Tensor] | None = None,
    ema_lows: list[Tensor] | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    ema_decay: float = 0.999,
) -> None:
    """Step every parameter in place. See `reference.fused_adamw_` for the formulas; they are those of `torch.optim.AdamW`.

    `step`, `lr` and `grad_scale` may be device tensors: a captured graph then uses their current values, and nothing
    synchronises. A plain number is copied to the device in every call; a captured graph repeats the number it was captured
    with.

    To clip by norm without synchronising, use `grad_scale`:

        norm = torch.nn.utils.get_total_norm(grads)
        fused_adamw_(..., grad_scale=(max_grad_norm / (norm + 1e-6)).clamp(max=1.0))

    Args:
        params: float32, or bfloat16 if `lows` contains the int16 low halves (`reference.split_weights` makes the pair).
        grads: same shapes as `params`; float32, bfloat16 or float16, all with the same dtype.
        exp_avgs, exp_avg_sqs: float32, same shapes as `params`; zeros before the first step.
        step: the number of this step, starting at 1; an integer, or one int64 element on the parameters' device.
        lr: a number, or one float32 element there.
        grad_scale: multiplies the gradients; a number, or one float32 element there.
        emas, ema_lows: moving averages of the parameters, in the parameters' layout, updated after them.

    Raises:
        ValueError: lists, shapes, dtypes, devices or memory orders do not match; on the CPU also a step below 1.
    """
    lists = {
        "params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs,
        "lows": [] if lows is None else lows, "emas": [] if emas is None else emas,
        "ema_lows": [] if ema_lows is None else ema_lows,
    }  # fmt: skip
    for name, tensors in lists.items():
        _check_list(name, tensors)
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"fused_adamw_ got betas = {betas!r}; expected two numbers, for example (0.9, 0.999)")
    settings = [number("fused_adamw_", "betas", beta) for beta in betas]
    for name, value in (("eps", eps), ("weight_decay", weight_decay), ("ema_decay", ema_decay)):
        settings.append(number("fused_adamw_", name, value))
    if not params:
        return
    _check(lists)
    device = params[0].device
    step, lr = _step(step, device), _scalar("lr", lr, device)
    if grad_scale is not None:
        grad_scale = _scalar("grad_scale", grad_scale, device)
    with torch.no_grad():
        _op(*lists.values(), step, lr, grad_scale, *settings)


def _check_list(name: str, tensors: list[Tensor]) -> None:
    """Only checks the first tensor: a model has hundreds, and `_check` compares all of them."""
    if not isinstance(tensors, list | tuple):
        remedy = f"list({name})" if isinstance(tensors, Iterator) else f"[{name}]"
        raise ValueError(
            f"fused_adamw_ got {name} of type {type(tensors).__name__}; expected a list of tensors, for example {remedy}"
        )
    if tensors:
        check_tensor("fused_adamw_", f"{name}[0]", tensors[0])


def _step(step: int | Tensor, device: torch.device) -> Tensor:
    if not isinstance(step, Tensor):
        return torch.full((), _counted(integer("fused_adamw_", "step", step, 63)), dtype=torch.int64, device=device)
    check_scalar_tensor("fused_adamw_", "step", step, torch.int64, device)
    return step


def _counted(step: int) -> int:
    if step < 1:
        raise ValueError(f"fused_adamw_ got step = {step}; expected 1 or more: count the step before taking it")
    return step


def _scalar(name: str, value: float | Tensor, device: torch.device) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.full((), number("fused_adamw_", name, value), dtype=torch.float32, device=device)
    check_scalar_tensor("fused_adamw_", name, value, torch.float32, device)
    return value


def _check(lists: dict[str, list[Tensor]]) -> None:
    params, split = lists["params"], bool(lists["lows"])
    device, weight = params[0].device, torch.bfloat16 if split else torch.float32
    grad = lists["grads"][0].dtype if lists["grads"] else torch.float32
    dtypes = {
        "params": weight, "grads": grad, "exp_avgs": torch.float32, "exp_avg_sqs": torch.float32,
        "lows": torch.int16, "emas": weight, "ema_lows": torch.int16,
    }  # fmt: skip
    if grad not in extension.DTYPES:
        raise ValueError(f"fused_adamw_ got grads of {grad}; expected float32, bfloat16 or float16")
    if bool(lists["ema_lows"]) != (split and bool(lists["emas"])):
        raise ValueError(
            "fused_adamw_ got averages in another layout than params; expected ema_lows exactly if lows is given"
        )
    shapes = [getattr(param, "shape", None) for param in params]
    for name, tensors in lists.items():
        if name in ("lows", "emas", "ema_lows") and not tensors:
            continue
        if len(tensors) != len(params):
            raise ValueError(f"fused_adamw_ got {len(tensors)} {name} for {len(params)} params; expected as many")
        # Compare whole columns, which is fast: a model has hundreds of parameters, and this runs in every step.
        expected = [(shape, dtypes[name], device) for shape in shapes]
        try:
            found = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        except AttributeError:
            found = []
        if found != expected:
            for index, tensor in enumerate(tensors):
                check_tensor("fused_adamw_", f"{name}[{index}]", tensor)
            pairs = zip(found, expected, strict=True)
            got, wanted = next((_kind(*got), _kind(*wanted)) for got, wanted in pairs if got != wanted)
            raise ValueError(f"fused_adamw_ got one of {name} as {got}; expected {wanted}")
        for tensor, param in zip(tensors, params, strict=True):
            if name != "grads" and not same_order(tensor, param):
                raise ValueError(
                    f"fused_adamw_ got one of {name} with strides {tensor.stride()} for a parameter {tuple(param.shape)} "
                    f"with strides {param.stride()}; expected the same memory order, as from torch.empty_like(param)"
                )
    for param in params:
        if not param.is_contiguous() and not param.is_contiguous(memory_format=memory_format(param)):
            raise ValueError(
                f"fused_adamw_ got a parameter {tuple(param.shape)} with strides {param.stride()}; "
                "expected row-major or channels last, as from contiguous()"
            )


def _kind(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> str:
    return f"{dtype} {tuple(shape)} on {device}"


def _run(
    params, grads, exp_avgs, exp_avg_sqs, lows, emas, ema_lows, step, lr, grad_scale, beta1, beta2, eps, weight_decay,
    ema_decay,
):  # fmt: skip
    device = params[0].device
    if device.type == "cpu":
        _counted(step.item())
    # The moments are float32 in every layout, so they select the backend.
    if backend_for("fused_adamw_", exp_avgs[0], cuda="cpp") == "reference":
        reference.fused_adamw_(
            params, grads, exp_avgs, exp_avg_sqs, step, lr, grad_scale, lows, emas, ema_lows, beta1, beta2, eps,
            weight_decay, ema_decay,
        )  # fmt: skip
        return
    # Gradients may have another memory order than their parameters. Everything else is updated in place.
    grads = [
        grad if same_order(grad, param) else torch.empty_like(param, dtype=grad.dtype).copy_(grad)
        for param, grad in zip(params, grads, strict=True)
    ]
    columns = [params, lows, grads, exp_avgs, exp_avg_sqs, emas, ema_lows]
    addresses = [[tensor.data_ptr() for tensor in column] or [0] * len(params) for column in columns]
    tensors = list(zip(*addresses, [param.numel() for param in params], strict=True))
    settings = (extension.DTYPES.index(grads[0].dtype), beta1, beta2, eps, weight_decay, ema_decay)
    if device.type == "cpu":
        scale = 1.0 if grad_scale is None else grad_scale.item()
        extension._C.fused_adamw(tensors, *settings, step.item(), lr.item(), scale, torch.get_num_threads())
        return
    scale = 0 if grad_scale is None else grad_scale.data_ptr()
    stream = torch.cuda.current_stream(device).cuda_stream
    extension._C.fused_adamw_cuda(tensors, *settings, step.data_ptr(), lr.data_ptr(), scale, device.index, stream)


_op = register(
    "fused_adamw_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] lows, "
    "Tensor(e!)[] emas, Tensor(f!)[] ema_lows, Tensor step, Tensor lr, Tensor? grad_scale, float beta1, float beta2, "
    "float eps, float weight_decay, float ema_decay) -> ()",
    _run, lambda *args: None,
)  # fmt: skip
