"""When a fast path may stand in for calls of layers.

A fast path reads the weights of layers and never calls them. It may be taken only where
nobody can tell: not if a hook, a parametrisation, an adapter, a pruning mask, a counter
or an exporter waits for the call.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.utils._device import DeviceContext

# Attributes of a module that hold its hooks. With `_global` before them they are names
# in torch.nn.modules.module, of the hooks on all modules.
_HOOKS = (
    '_forward_hooks',
    '_forward_pre_hooks',
    '_backward_hooks',
    '_backward_pre_hooks',
)
# PyTorch's own formulas. A program may have put another `forward` into the class.
_FORWARDS: dict[type[nn.Module], Any] = {
    kind: kind.forward for kind in (nn.Conv2d, nn.Dropout, nn.GELU, nn.Linear)
}


def is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a layer does nothing but compute PyTorch's formula for it.

    Args:
        layer (nn.Module): The layer.
        kind (type): ``nn.Conv2d``, ``nn.Dropout``, ``nn.GELU`` or ``nn.Linear``.

    Returns:
        bool: False if the layer is of another class (a subclass, an adapter, a
        parametrisation), has another ``forward``, hooks, or parameters of a tensor
        subclass.
    """
    return (
        type(layer) is kind
        and kind.forward is _FORWARDS[kind]
        and 'forward' not in layer.__dict__
        and not any(getattr(layer, name) for name in _HOOKS)
        and (torch.compiler.is_compiling() or _has_plain_parameters(layer))
    )


def _has_plain_parameters(layer: nn.Module) -> bool:
    return all(
        parameter is None or type(parameter) in (nn.Parameter, Tensor)
        for parameter in vars(layer)['_parameters'].values()
    )


def is_watched(x: Tensor) -> bool:
    """Whether something would see every layer that is called with ``x``.

    That is a hook on all modules, a function mode or dispatch mode (FLOP counters, fake
    tensors), a subclass of Tensor, the meta device (where nothing is to be saved), a
    transform of ``torch.func``, or a recording of the code by a compiler or exporter,
    which finds its own plan.
    """
    return (
        is_exporting()
        or torch.compiler.is_compiling()
        or is_transformed()
        or type(x) not in (Tensor, nn.Parameter)
        or x.is_meta
        or any(getattr(torch_module, f'_global{name}') for name in _HOOKS)
        or _is_mode_active()
    )


def is_exporting() -> bool:
    """Whether TorchScript or ONNX export records, which know no operator of ours."""
    return (
        torch.jit.is_scripting()
        or torch.jit.is_tracing()
        or torch.onnx.is_in_onnx_export()
    )


def is_transformed() -> bool:
    """Whether ``torch.func`` (``grad``, ``vmap``) or forward-mode AD is at work."""
    if torch.compiler.is_compiling():
        return False  # Dynamo has answers of its own to the questions below
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def _is_mode_active() -> bool:
    if torch._C._len_torch_dispatch_stack() > 0:
        return True
    # a default device is a function mode too, and observes nothing
    modes = torch.overrides._get_current_function_mode_stack()
    return any(not isinstance(mode, DeviceContext) for mode in modes)
