"""Whether a fast path may replace the calls of layers.

A fast path reads the weights of layers without calling them. It must not be taken if a
hook, a parametrisation, an adapter, a pruning mask, a FLOP counter or an exporter
depends on the calls.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.utils._device import DeviceContext

# Attributes of a module that hold its hooks. Hooks on all modules have the same names
# in torch.nn.modules.module, with `_global` before them.
_HOOKS = (
    '_forward_hooks',
    '_forward_pre_hooks',
    '_backward_hooks',
    '_backward_pre_hooks',
)
# PyTorch's own methods, since a program may have replaced them in the classes
_FORWARDS: dict[type[nn.Module], Any] = {
    kind: kind.forward for kind in (nn.Conv2d, nn.Dropout, nn.GELU, nn.Linear)
}


def is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a layer is PyTorch's own, without anything attached to it.

    Args:
        layer (nn.Module): The layer.
        kind (type): ``nn.Conv2d``, ``nn.Dropout``, ``nn.GELU`` or ``nn.Linear``.

    Returns:
        bool: False if the layer is of another class (a subclass, an adapter, a
        parametrisation), or has another ``forward``, hooks, or parameters of a tensor
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
    """Whether something observes all layers that are called with ``x``.

    That may be a hook on all modules, a function or dispatch mode (FLOP counters, fake
    tensors), a subclass of Tensor, a transform of ``torch.func``, or a compiler or
    exporter, which records the layers. On the meta device there is nothing to save.
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
    """Whether export to TorchScript or ONNX is running, without our operators."""
    return (
        torch.jit.is_scripting()
        or torch.jit.is_tracing()
        or torch.onnx.is_in_onnx_export()
    )


def is_transformed() -> bool:
    """Whether ``torch.func`` (``grad``, ``vmap``, ...) or forward-mode AD is active."""
    if torch.compiler.is_compiling():
        return False  # Dynamo cannot trace the calls below
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def _is_mode_active() -> bool:
    if torch._C._len_torch_dispatch_stack() > 0:
        return True
    # a default device is a function mode too, but observes nothing
    modes = torch.overrides._get_current_function_mode_stack()
    return any(not isinstance(mode, DeviceContext) for mode in modes)
