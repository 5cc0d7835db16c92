"""A GPU that is not there: tensors that compute on the CPU and say that they lie on "cuda".

An operation that mixes them with CPU tensors fails, as it would on a GPU, and so does reading their values on the host, for
which a GPU must be waited for.
"""

from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)


class OnDevice(torch.Tensor):
    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            held.stride(),
            held.storage_offset(),
            dtype=held.dtype,
            device="meta",
            requires_grad=held.requires_grad,
        )

    def __init__(self, held):
        self.held = held

    device = property(lambda self: CUDA)  # PyTorch itself takes it for a tensor on meta, for which it needs no driver
    is_meta = property(lambda self: False)
    is_cuda = property(lambda self: True)

    def __repr__(self):
        return f"OnDevice({tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return run(op, args, kwargs or {})


crossings: list[str] = []  # copies between the device and the host


def is_cuda(device):
    return device is not None and torch.device(device).type in ("cuda", "meta")


def run(op, args, kwargs):
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    here = any(isinstance(leaf, OnDevice) for leaf in leaves)
    strangers = [leaf for leaf in leaves if not isinstance(leaf, OnDevice) and leaf.ndim]
    name = op.overloadpacket.__name__
    if here and strangers and name not in ("copy_", "_to_copy"):
        raise RuntimeError(f"{op} mixes the device with the CPU: {[tuple(leaf.shape) for leaf in leaves]}")
    if here and name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero"):
        raise RuntimeError(f"{op} reads the device from the host")
    target = kwargs.get("device")
    if is_cuda(target):
        kwargs = kwargs | {"device": torch.device("cpu")}
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    stays = is_cuda(target) or (here and target is None)
    if name in ("copy_", "_to_copy") and ((strangers and here) or stays != here):
        crossings.append(str([tuple(leaf.shape) for leaf in leaves]))
    inner = tree_map(lambda leaf: leaf.held if isinstance(leaf, OnDevice) else leaf, (args, kwargs))
    output = op(*inner[0], **inner[1])
    if op._schema.is_mutable:
        return args[0] if isinstance(output, torch.Tensor) else output
    if name == "_to_copy" and output is inner[0][0]:
        output = output.clone()
    return tree_map(lambda leaf: OnDevice(leaf) if stays and type(leaf) is torch.Tensor else leaf, output)


class Pretend(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return run(op, args, kwargs or {})


@contextmanager
def pretended_device():
    """ "cuda" can be asked for within; pinned memory is ordinary memory."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with (
            Pretend(),
            patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor),
            patch("torch.cuda._lazy_init"),
            patch("torch.cuda.empty_cache"),
            patch("torch.cuda.set_device"),
            patch("torch.cuda.mem_get_info", lambda device: (1 << 40, 1 << 40)),
        ):
            yield CUDA
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
