"""A stand-in for CUDA graphs on the CPU: keeps the function and its tensors, calls it again, watches what it touches.

A capture fails the test when the function reads a tensor that is neither static nor its own (weights, tables, an
arena), or holds one that belongs to a row. It raises what a device would raise when the function reads a value on the
host or makes a tensor from one.
"""

import functools
import sys
import types
from contextlib import nullcontext

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FROM_HOST = (torch.tensor, torch.as_tensor, torch.from_numpy)
TO_HOST = tuple(
    getattr(torch.Tensor, name)
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__contains__")
)
READ_LANES = {
    f"vivace.kernels.{name}"
    for name in ("cache_update.check", "cache_update.cpu_impl", "cache_apply.cpu_impl", "gather_tokens.check")
    + ("scatter_tokens.cpu_impl", "attention.cpu_impl")
}
WAITING = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique_dim", "_unique2")


class HostTouched(RuntimeError):
    """What a capture on a device refuses."""


class Recording:
    """Graphs on the CPU, and the network they are of: its `stage` tells which memory belongs to a row."""

    device = "cpu"

    def __init__(self, network):
        self.network, self.warmed, self.captured, self.of_row, self.graphs = network, 0, 0, set(), []

    def __getattr__(self, name):
        return getattr(self.network, name)

    def stage(self, call, variant, bucket=int):
        pieces = self.network.stage(call, variant, bucket)
        parts = [part for piece in pieces for parts in piece.inputs.values() for part in parts]
        self.of_row = {address(tensor) for tensor in (call.x, *parts)}
        return pieces

    def ready(self, device):
        return nullcontext()

    def warm_up(self, forward, inputs):
        forward(inputs)
        self.warmed += 1

    def capture(self, forward, inputs):
        held = reachable(forward)
        if any(address(tensor) in self.of_row for tensor in held):
            raise AssertionError("the function holds tensors of its first row")
        with Watch(inputs.values(), held), NoHost():
            forward(inputs)
        self.captured += 1
        self.graphs.append(Recorded(forward, inputs, self.graphs))
        return self.graphs[-1]


class Recorded:
    nbytes = 0

    def __init__(self, forward, inputs, others):
        self.forward, self.inputs, self.others, self.result = forward, inputs, others, None

    def replay(self):
        """The same function on the same tensors, into the same memory; results of other graphs are lost by it."""
        made = self.forward(self.inputs)
        for other in self.others:
            if other.result is not None:
                other.result.fill_(float("nan"))
        if self.result is None:
            self.result = torch.empty_like(made)
        return self.result.copy_(made)


class Watch(TorchDispatchMode):
    """Fails when an op reads memory that is neither known nor made since."""

    def __init__(self, static, constants):
        super().__init__()
        self.known = {address(tensor) for tensor in (*static, *constants)}
        self.made = []  # kept, so that no address is used twice

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        if func.overloadpacket.__name__ in WAITING and not of_lanes(sys._getframe(1)):
            raise HostTouched(f"{func} waits for the device")
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and address(tensor) not in self.known:
                raise AssertionError(f"{func} reads a tensor {tuple(tensor.shape)} that is not static")
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.made.append(tensor)
                self.known.add(address(tensor))
        return out


class NoHost(TorchFunctionMode):
    """Raises what a capture raises when values cross between host and device."""

    def __torch_function__(self, func, kinds, args=(), kwargs=None):
        if func in TO_HOST and not of_lanes(sys._getframe(1)):
            raise HostTouched(f"{func.__name__} reads a value on the host")
        if func in FROM_HOST and not isinstance(args[0], torch.Tensor):
            raise HostTouched(f"{func.__name__} makes a tensor from host data")
        return func(*args, **(kwargs or {}))


def of_lanes(frame):
    """The call comes from where an op of a processor looks at lanes and ids, as its kernel on a device does there."""
    for _ in range(4):
        if frame is None or frame.f_globals["__name__"] in READ_LANES:
            return frame is not None
        frame = frame.f_back
    return False


def address(tensor):
    """The memory of a tensor; packed weights have none that can be asked for."""
    return id(tensor) if tensor.is_mkldnn else tensor.untyped_storage()._cdata


def reachable(thing):
    """Tensors a function holds on to: in its closure, in the objects there, in modules."""
    found, seen, waiting = [], set(), [thing]
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, (type, types.ModuleType, str, int, float)):
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            found.append(one)
        elif isinstance(one, (dict, types.MappingProxyType)):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, (list, tuple, set, frozenset)):
            waiting += one
        elif isinstance(one, types.FunctionType):
            waiting += [cell.cell_contents for cell in one.__closure__ or ()]
        elif isinstance(one, functools.partial):
            waiting += [one.func, *one.args, *one.keywords.values()]
        elif isinstance(one, types.MethodType):
            waiting += [one.__self__, one.__func__]
        else:
            waiting += [getattr(one, name) for name in getattr(type(one), "__slots__", ()) if hasattr(one, name)]
            waiting += getattr(one, "__dict__", {}).values()
    return found
