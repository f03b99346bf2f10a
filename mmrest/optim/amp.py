"""Mixed precision: bfloat16 in addition to MMEngine's float16, on GPUs and CPUs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner.amp import autocast
from torch import nn
from torch.utils._pytree import tree_map_only

from ..utils.config_types import type_name

DTYPES = ('bfloat16', 'float16')
# Modules that only receive float32: mmcv's operators do not support bfloat16, and its 8
# bits of precision are not enough for the coordinates of RoIs and for losses.
_INPUTS_IN_FLOAT32 = ('mmcv.ops.', '.roi_extractors.', '.losses.')
# Modules whose outputs determine the data type of anchors, boxes and scores in mmdet
_OUTPUTS_IN_FLOAT32 = ('_heads.', '.heads.')


class AmpError(ValueError):
    """Mixed precision that the device or the config does not support."""


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """An ``OptimWrapper`` with forward passes under bfloat16 autocast.

    bfloat16 has the range of float32, so the loss needs no scaling, and CPUs support
    it. MMEngine's ``AmpOptimWrapper`` scales the loss and refuses CPUs. Parameters,
    gradients and the optimizer stay in float32.

    Args:
        **kwargs: As for ``OptimWrapper``.
    """

    _prepared: Optional[nn.Module] = None

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Use autocast, in addition to gradient accumulation."""
        if self._prepared is not model:
            keep_in_float32(model)
            self._prepared = model
        with super().optim_context(model), autocast(dtype=torch.bfloat16):
            yield


def keep_in_float32(model: nn.Module) -> None:
    """Compute boxes, losses and mmcv's operators in float32 under bfloat16 autocast.

    mmcv's operators, RoI extractors and losses get hooks that cast their inputs, and
    heads get one that casts their outputs. Float32 is not affected. It may be called
    repeatedly.
    """
    for module in model.modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        if _to_float32 in hooks or _output_to_float32 in hooks:
            continue
        places = ' '.join(f'{kind.__module__}.' for kind in type(module).__mro__)
        if any(place in places for place in _INPUTS_IN_FLOAT32):
            module.register_forward_pre_hook(_to_float32, with_kwargs=True)
            module.register_forward_hook(_leave_float32, always_call=True)
        elif any(place in places for place in _OUTPUTS_IN_FLOAT32):
            module.register_forward_hook(_output_to_float32)


def _cast(values: Any) -> Any:
    return tree_map_only(
        torch.Tensor,
        lambda x: x.float() if x.dtype == torch.bfloat16 else x,
        values,
    )


def _to_float32(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    context = torch.autocast(get_device(), enabled=False)
    context.__enter__()
    module.__dict__.setdefault('_float32_contexts', []).append(context)
    return _cast((args, kwargs))


def _leave_float32(module: nn.Module, args: tuple, output: Any) -> None:
    module.__dict__['_float32_contexts'].pop().__exit__(None, None, None)


def _output_to_float32(module: nn.Module, args: tuple, output: Any) -> Any:
    return _cast(output)


def choose_dtype(requested: str) -> str:
    """Choose the data type of ``--amp``.

    ``'auto'`` is ``'bfloat16'`` if the device supports it, else ``'float16'``.

    Raises:
        AmpError: If the device does not support autocast in this data type.
    """
    device = get_device()
    if device == 'mps':
        raise AmpError(f'--amp works on GPUs and CPUs, and the device is {device}.')
    if device == 'cpu':
        if requested == 'float16':
            raise AmpError(
                '--amp float16 needs a GPU, and the device is cpu. Give --amp or '
                '--amp bfloat16.'
            )
        return 'bfloat16'
    # torch emulates bfloat16 on older GPUs, slower than float32
    has_bfloat16 = (
        device != 'cuda'
        or torch.version.hip is not None
        or torch.cuda.get_device_capability() >= (8, 0)
    )
    if requested == 'bfloat16' and not has_bfloat16:
        raise AmpError(
            f'--amp bfloat16: {torch.cuda.get_device_name()} does not compute in it. '
            'Give --amp or --amp float16.'
        )
    if requested == 'auto':
        return 'bfloat16' if has_bfloat16 else 'float16'
    return requested


def train_with_amp(cfg: Config, requested: Optional[str]) -> None:
    """Change a config to train in mixed precision.

    Args:
        cfg (Config): Its ``optim_wrapper`` is changed in place.
        requested (str, optional): As for :func:`choose_dtype`. None keeps the
            precision of the config.

    Raises:
        AmpError: As :func:`choose_dtype`; for an optimizer wrapper of another type,
            which would be replaced; and for MMEngine's ``AmpOptimWrapper`` on a CPU.
    """
    wrapper = cfg.get('optim_wrapper') or {}
    kinds = ('OptimWrapper', 'AmpOptimWrapper', 'BFloat16OptimWrapper')
    kind = type_name(wrapper) or kinds[0]
    if requested is None:
        if kind == 'AmpOptimWrapper' and get_device() == 'cpu':
            raise AmpError(
                "optim_wrapper is MMEngine's AmpOptimWrapper, which needs a GPU, and "
                'the device is cpu. Give --amp bfloat16, or --cfg-options '
                'optim_wrapper.type=OptimWrapper for float32.'
            )
        return
    if kind not in kinds or 'optimizer' not in wrapper:
        raise AmpError(
            f'--amp puts another optim_wrapper in the place of {kinds[0]}, and the '
            f'config has {kind if wrapper else "none"}. Choose the precision in '
            'optim_wrapper, without --amp.'
        )
    if choose_dtype(requested) == 'bfloat16':
        for key in ('loss_scale', 'dtype', 'use_fsdp'):
            wrapper.pop(key, None)
        wrapper['type'] = 'mmrest.optim.amp.BFloat16OptimWrapper'
    else:
        wrapper.update(type='AmpOptimWrapper', dtype='float16')
        wrapper.setdefault('loss_scale', 'dynamic')


def test_with_amp(model: nn.Module, requested: str) -> None:
    """Run the test steps of a model, wrapped or not, in mixed precision.

    Raises:
        AmpError: As :func:`choose_dtype`, and for a model that is not built yet.
    """
    if not isinstance(model, nn.Module):
        raise AmpError('--amp does not test with runner_type, which builds the model.')
    dtype = getattr(torch, choose_dtype(requested))
    keep_in_float32(model)
    tested: Any = model
    test_step = tested.test_step

    def autocast_step(*args: Any, **kwargs: Any) -> Any:
        with autocast(dtype=dtype):
            return test_step(*args, **kwargs)

    tested.test_step = autocast_step
