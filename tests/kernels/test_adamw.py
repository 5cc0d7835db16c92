"""The optimizer against torch.optim.AdamW, and the split layout against the plain one."""

import copy

import pytest
import torch

from selfnpo_kernels import backend, fused_adamw_, join_weights, split_weights

SHAPES = [(5, 7), (3000,), (1,), (0,), (2, 3, 4, 4)]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def tensors(device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device) for shape in SHAPES]


@pytest.fixture(params=[(name, device) for device in DEVICES for name in ("cpp", "reference")], ids="-".join)
def device(request):
    with backend(request.param[0]):
        yield request.param[1]


def run(device, steps, **options):
    """`steps` steps from fixed weights; options are those of fused_adamw_."""
    params = tensors(device)
    first, second = ([torch.zeros_like(param) for param in params] for _ in range(2))
    step, lr = torch.zeros((), dtype=torch.int64, device=device), torch.tensor(3e-2, device=device)
    for k in range(steps):
        step += 1
        fused_adamw_(params, tensors(device, k + 1), first, second, step=step, lr=lr, **options)
    return params


def test_is_torch_adamw_with_clipping_and_average(device):
    params, ours = ([param.requires_grad_() for param in tensors(device)] for _ in range(2))
    optimizer = torch.optim.AdamW(params, lr=3e-2, weight_decay=0.1, eps=1e-6)
    average = copy.deepcopy(params)
    ema = [param.detach().clone() for param in ours]
    first, second = ([torch.zeros_like(param) for param in ours] for _ in range(2))
    step, lr = torch.zeros((), dtype=torch.int64, device=device), torch.tensor(3e-2, device=device)
    for k in range(5):
        grads = tensors(device, k + 1)
        norm = torch.nn.utils.get_total_norm(grads)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, params, 0.1)
        step += 1
        fused_adamw_(
            ours, grads, first, second, step=step, lr=lr, grad_scale=(1.0 / (norm + 1e-6)).clamp(max=1.0), emas=ema,
            eps=1e-6, weight_decay=0.1, ema_decay=0.9,
        )  # fmt: skip
    moments = [optimizer.state[param][name] for name in ("exp_avg", "exp_avg_sq") for param in params]
    for mine, theirs in zip([*ours, *ema, *first, *second], [*params, *average, *moments], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=2e-7)


def test_split_weights_lose_nothing(device):
    values = torch.cat((torch.randn(10000), torch.randn(10000) * 1e-30, torch.tensor([0.0, -0.0, 1.0, 3.4e38, 1e-45])))
    high, low = split_weights(values.to(device))
    assert join_weights(high, low).view(torch.int32).equal(values.to(device).view(torch.int32))
    nearest = values[:-2].to(device).bfloat16()
    ties = (values[:-2].to(device).view(torch.int32) & 0xFFFF) == 0x8000
    assert high[:-2][~ties].equal(nearest[~ties])


def test_a_broken_weight_stays_visible(device):
    """The bfloat16 half of a NaN is a NaN, whatever its bits."""
    for bits in (0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001):
        nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32).to(device)
        assert split_weights(nan)[0].isnan()
        high, low = (half.clone() for half in split_weights(torch.ones(1, device=device)))
        first, second = torch.zeros(1, device=device), torch.zeros(1, device=device)
        step, lr = torch.tensor(1, device=device), torch.tensor(0.1, device=device)
        fused_adamw_([high], [nan], [first], [second], step=step, lr=lr, lows=[low])
        assert high.isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_split_steps_are_plain_steps_bit_for_bit(dtype, device):
    plain = tensors(device)
    highs, lows = map(list, zip(*map(split_weights, plain), strict=True))
    emas = [param.clone() for param in plain]
    ema_highs, ema_lows = ([half.clone() for half in halves] for halves in (highs, lows))
    moments = [[torch.zeros_like(param) for param in plain] for _ in range(4)]
    step, lr = torch.zeros((), dtype=torch.int64, device=device), torch.tensor(1e-4, device=device)
    for k in range(3):
        grads = [grad.to(dtype) for grad in tensors(device, k + 1)]
        step += 1
        fused_adamw_(plain, grads, *moments[:2], step=step, lr=lr, emas=emas)
        fused_adamw_(highs, grads, *moments[2:], step=step, lr=lr, lows=lows, emas=ema_highs, ema_lows=ema_lows)
    for weights, halves in ((plain, (highs, lows)), (emas, (ema_highs, ema_lows))):
        for value, high, low in zip(weights, *halves, strict=True):
            assert join_weights(high, low).equal(value)


def test_threads_change_nothing():
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run("cpu", 2))
    for one, *others in zip(*results, strict=True):
        assert all(one.equal(other) for other in others)


def test_weights_stored_in_any_dense_order(device):
    def stored(tensor):
        return tensor.contiguous(memory_format=torch.channels_last)

    results = []
    for layout in (torch.Tensor.contiguous, stored):
        param, first, second = (layout(torch.ones(2, 3, 4, 4, device=device) * k) for k in (1, 0, 0))
        grad = tensors(device)[-1]
        step, lr = torch.tensor(1, device=device), torch.tensor(0.1, device=device)
        fused_adamw_([param], [grad], [first], [second], step=step, lr=lr)
        results.append(param)
    assert results[0].equal(results[1])


def test_strides_of_dimensions_with_one_entry_do_not_count(device):
    """A 1x1 convolution's halves in channels-last order have such strides: (3, 1, 3, 3) beside (3, 1, 1, 1)."""
    results = []
    for stored in (False, True):
        values = torch.linspace(-1, 1, 12, device=device).reshape(4, 3, 1, 1)
        high, low = split_weights(values)
        if stored:
            high = high.as_strided((4, 3, 1, 1), (3, 1, 3, 3))
        first, second = (torch.zeros(4, 3, 1, 1, device=device) for _ in range(2))
        grad = (values * 2).as_strided((4, 3, 1, 1), (3, 1, 7, 5))
        step, lr = torch.tensor(1, device=device), torch.tensor(0.1, device=device)
        fused_adamw_([high], [grad], [first], [second], step=step, lr=lr, lows=[low])
        results.append(join_weights(high, low))
    assert results[0].equal(results[1])


def test_nothing_to_do():
    fused_adamw_([], [], [], [], step=torch.tensor(1), lr=torch.tensor(0.1))


def test_no_triton_kernel_is_claimed():
    with backend("triton"), pytest.raises(RuntimeError, match="no Triton kernel; use cpp or reference"):
        run("cpu", 1)
