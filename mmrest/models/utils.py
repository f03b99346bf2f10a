"""Helpers of the backbones: layouts, arguments, parts from configs, freezing."""

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from numbers import Integral, Real
from typing import Any, Optional, Union
from weakref import ref

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from ..ops.fast_path import is_exporting

NUM_STAGES = 4

PartCfg = Union[str, dict]

# ---------------------------------------------------------------- layouts


def to_map(x: Tensor, size: tuple[int, int]) -> Tensor:
    """View tokens (B, H * W, C) as a map (B, C, H, W)."""
    # no unflatten, with which the legacy ONNX exporter fixes the size of its example
    x = x.reshape(x.shape[0], size[0], size[1], x.shape[2]).permute(0, 3, 1, 2)
    if torch.compiler.is_dynamo_compiling() and not is_exporting():
        return _channels_last_copy(x)
    return x


# Inductor (PyTorch 2.13) cannot save a view of unknown size for the backward pass of a
# convolution ("cannot determine truth value of Relational"), so it gets a copy.
@torch.library.custom_op('mmrest::channels_last_copy', mutates_args=())
def _channels_last_copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.channels_last)


@_channels_last_copy.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


_channels_last_copy.register_autograd(lambda ctx, grad: grad)


def to_tokens(x: Tensor) -> Tensor:
    """View a map (B, C, H, W) as tokens (B, H * W, C).

    A map that is not in channels_last order is copied.
    """
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def depthwise_conv(
    dim: int, out_dim: Optional[int] = None, **options: Any
) -> nn.Conv2d:
    """Build a depthwise convolution; ``out_dim`` is a multiple of ``dim``."""
    return nn.Conv2d(dim, out_dim or dim, groups=dim, **options)


def reduce_map(conv: nn.Module, x: Tensor) -> Tensor:
    """Reduce a map by the strided depthwise convolution of the attention.

    On CPUs its gradients take 5 to 14 times as long in bfloat16 as in float32, so
    training under autocast computes it in float32.
    """
    if not (
        x.device.type == 'cpu'
        and torch.is_grad_enabled()
        and torch.is_autocast_enabled('cpu')
    ):
        return conv(x)
    dtype = next((p.dtype for p in conv.parameters()), x.dtype)
    with torch.autocast('cpu', enabled=False):
        return conv(x.to(dtype))


def match_gradient_strides(module: nn.Module) -> None:
    """Give the gradients of convolutions the strides of their weights.

    DistributedDataParallel copies gradients whose strides are not those of the
    parameter, and warns. A dimension of size 1 may have any stride. Which one it has in
    depthwise and 1x1 convolutions depends on device and type. It may be called again,
    for new parameters.
    """
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            hooks = (parameter._backward_hooks or {}).values()
            if (
                type(parameter) is nn.Parameter  # not one that is sharded
                and parameter.requires_grad
                and parameter.dim() == 4
                and 1 in parameter.shape
                and not any(getattr(h, 'func', None) is _with_strides_of for h in hooks)
            ):
                # torch.utils.swap_tensors refuses a parameter with a weak reference
                parameter.register_hook(partial(_with_strides_of, ref(part), name))


def _with_strides_of(part: Any, name: str, grad: Tensor) -> Tensor:
    parameter = getattr(part(), '_parameters', {}).get(name)
    if parameter is None or not grad.is_contiguous():
        return grad
    strides = parameter.stride()
    return grad if grad.stride() == strides else grad.as_strided(grad.size(), strides)


# ---------------------------------------------------------------- arguments


def resolve_arch(arch: Union[str, dict], archs: dict[str, Any]) -> Any:
    """Return the ``Arch`` of a name or a dict.

    Args:
        arch (str | dict): A key of ``archs``, or a dict with the fields of ``Arch``. A
            single number as ``mlp_ratios`` applies to all stages.
        archs (dict[str, Arch]): The published variants.

    Raises:
        ValueError: If the name is unknown, or an entry of the dict is missing,
            unknown or inconsistent.
    """
    if isinstance(arch, str) and arch in archs:
        return archs[arch]
    if isinstance(arch, str):
        raise ValueError(
            f'arch must be one of {", ".join(map(repr, archs))} or a dict, '
            f'found {arch!r}'
        )
    if not isinstance(arch, dict):
        raise ValueError(f'arch must be a name or a dict, found {arch!r}')
    kind = type(next(iter(archs.values())))
    entries = dict(arch)
    if isinstance(entries.get('mlp_ratios'), Real):
        entries['mlp_ratios'] = [entries['mlp_ratios']] * NUM_STAGES

    missing = sorted(set(kind._fields) - set(kind._field_defaults) - set(entries))
    unknown = sorted(map(str, set(entries) - set(kind._fields)))
    if missing or unknown:
        raise ValueError(
            f'an arch dict has the entries {", ".join(kind._fields)}; '
            f'missing: {", ".join(missing) or "none"}, '
            f'unknown: {", ".join(unknown) or "none"}'
        )
    for name, values in entries.items():
        _check_arch_entry(name, values)
    resolved = kind(**{name: tuple(values) for name, values in entries.items()})
    sizes = zip(resolved.embed_dims, resolved.num_heads, resolved.sr_ratios)
    for stage, (dim, heads, ratio) in enumerate(sizes, start=1):
        if dim % heads:
            raise ValueError(
                f'stage {stage}: embed_dims {dim} is not divisible by num_heads {heads}'
            )
        if ratio > 1 and ratio % 2:
            raise ValueError(
                f'stage {stage}: sr_ratios must be 1 or even, so that ratio r reduces '
                f'H to ceil(H / r), found {ratio}'
            )
    if resolved.embed_dims[0] % 2:
        raise ValueError(
            'embed_dims of stage 1 must be even (the stem starts with half of it), '
            f'found {resolved.embed_dims[0]}'
        )
    return resolved


def _check_arch_entry(name: str, values: Any) -> None:
    kind, word = (Real, 'numbers') if name == 'mlp_ratios' else (Integral, 'integers')
    fits = (
        isinstance(values, (list, tuple))
        and len(values) == NUM_STAGES
        and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)
        and all(v > 0 for v in values)
    )
    if not fits:
        raise ValueError(
            f'arch entry {name!r} must hold {NUM_STAGES} positive {word}, '
            f'one a stage, found {values!r}'
        )


def check_out_indices(out_indices: Sequence[int]) -> tuple[int, ...]:
    """Return the indices as a tuple, or raise a ``ValueError``."""
    indices = tuple(out_indices) if isinstance(out_indices, (list, tuple)) else ()
    in_range = all(_is_int(i) and 0 <= i < NUM_STAGES for i in indices)
    if not indices or not in_range or list(indices) != sorted(set(indices)):
        raise ValueError(
            f'out_indices must be ascending stage indices from 0 to {NUM_STAGES - 1} '
            f'(at least one), found {out_indices!r}'
        )
    return indices


def check_frozen_stages(frozen_stages: int) -> int:
    """Return the number, or raise a ``ValueError``."""
    if not _is_int(frozen_stages) or not -1 <= frozen_stages <= NUM_STAGES:
        raise ValueError(
            'frozen_stages must be an integer from -1 (nothing) over 0 (stem) to '
            f'{NUM_STAGES} (everything but the output norms), found {frozen_stages!r}'
        )
    return frozen_stages


def check_norm_cfg(norm_cfg: dict) -> dict:
    """Return the config, or raise a ``ValueError``."""
    if not isinstance(norm_cfg, dict) or 'type' not in norm_cfg:
        raise ValueError(
            "norm_cfg must be a dict with a 'type', such as dict(type='BN') or "
            f"dict(type='SyncBN'), found {norm_cfg!r}"
        )
    return norm_cfg


def merge_pretrained(
    init_cfg: Union[dict, list, None], pretrained: Optional[str]
) -> Union[dict, list, None]:
    """Turn the deprecated argument ``pretrained`` into an ``init_cfg``.

    Raises:
        ValueError: If both are given, or ``pretrained`` is not a string.
    """
    if pretrained is None:
        return init_cfg
    if init_cfg is not None:
        raise ValueError(
            f'init_cfg and pretrained are both given ({init_cfg!r}, {pretrained!r}). '
            'Give only init_cfg; pretrained is deprecated.'
        )
    if not isinstance(pretrained, str):
        raise ValueError(
            f'pretrained must be the path or URL of a checkpoint, found {pretrained!r}'
        )
    warnings.warn(
        "pretrained is deprecated. Use init_cfg=dict(type='Pretrained', "
        f'checkpoint={pretrained!r}) instead.',
        DeprecationWarning,
        stacklevel=4,
    )
    return dict(type='Pretrained', checkpoint=pretrained)


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


# ---------------------------------------------------------------- parts from configs

# Names that constructors of other packages use for the channels of a map
_CHANNELS = ('dim', 'in_channels', 'channels', 'embed_dims', 'num_channels')


def build_part(part: str, cfg: PartCfg, **given: Any) -> nn.Module:
    """Build a stem, positional encoding or attention from its config.

    The name ``'pa'`` as ``pos_cfg`` is short for ``'rest_pos_pa'`` in MMEngine's
    ``MODELS``. Other names are looked up there as they are.

    - A stem receives ``in_channels``, ``dim``, ``norm_cfg`` and ``pos``. It turns an
      image into ``pos(map)``, of shape (B, dim, ceil(H / 4), ceil(W / 4)).
    - A positional encoding receives ``dim``, under the name that its constructor has
      for channels, and ``map_stride``, the pixels of the image per entry of the map, if
      it has such an argument. It keeps the shape of a map.
    - An attention receives ``dim``, ``num_heads``, ``sr_ratio``, ``qkv_bias``,
      ``attn_drop``, ``proj_drop`` and ``attn_impl``. It takes tokens (B, H * W, dim)
      and the size (H, W), and returns tokens.

    Args:
        part (str): ``'stem'``, ``'pos'`` or ``'attn'``.
        cfg (str | dict): A name, or a dict with ``type`` and options.
        **given: Arguments that the network passes to the constructor.

    Raises:
        ValueError: If the name is unknown or an option does not fit.
    """
    options = dict(type=cfg) if isinstance(cfg, (str, type)) else cfg
    kind = options.get('type') if isinstance(options, dict) else None
    if not isinstance(kind, (str, type)):
        raise ValueError(
            f"{part}_cfg must be {_known(part)}, or a dict with such a 'type', "
            f'found {cfg!r}'
        )
    cls = kind if isinstance(kind, type) else _look_up(part, kind)
    if cls is None:
        raise ValueError(
            f"{part}_cfg must be {_known(part)}, or a module in MMEngine's MODELS, "
            f'found {kind!r}'
        )
    if part == 'pos':
        given = _position_arguments(cls, **given)
    arguments = {**given, **options}
    del arguments['type']
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ValueError(
            f'{part}_cfg: {kind!r} cannot be built with {", ".join(arguments)}: {error}'
        ) from error


def _look_up(part: str, name: str) -> Optional[type]:
    own = MODELS.module_dict.get(f'rest_{part}_{name}')
    if own is not None:
        return own
    # as MODELS.build does, in the registry of the default scope first
    with MODELS.switch_scope_and_registry(None) as models:
        return models.get(name)


def _position_arguments(cls: type, dim: int, map_stride: int) -> dict[str, int]:
    taken = inspect.signature(cls).parameters
    given = [(name, dim) for name in _CHANNELS if name in taken][:1]
    if 'map_stride' in taken:
        given.append(('map_stride', map_stride))
    return dict(given)


def _known(part: str) -> str:
    start = f'rest_{part}_'
    names = [n[len(start) :] for n in MODELS.module_dict if n.startswith(start)]
    return f'one of {", ".join(map(repr, names))}'


# ------------------------------------------------- freezing and recomputation


def freeze(module: nn.Module) -> None:
    """Turn off gradients, and put norms into evaluation mode."""
    module.eval()
    module.requires_grad_(False)


def checkpoint_module(module: nn.Module, *args: Any) -> Tensor:
    """Call a module so that it stores only its inputs and recomputes the rest.

    BatchNorms update their running statistics in the first pass only.
    """
    if not torch.is_grad_enabled():
        return module(*args)
    options: dict[str, Any] = {}
    if _live_norms(module):
        if torch.compiler.is_compiling():  # Dynamo does not support context_fn
            return module(*args)
        options['context_fn'] = partial(_contexts_of_passes, module)
    return checkpoint(module, *args, use_reentrant=False, **options)


def _contexts_of_passes(
    module: nn.Module,
) -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), _without_updates(module)


@contextmanager
def _without_updates(module: nn.Module) -> Iterator[None]:
    norms = _live_norms(module)
    buffers = [dict(norm.named_buffers(recurse=False)) for norm in norms]
    # autograd needs the same tensors afterwards, so copies receive the updates
    for norm, tensors in zip(norms, buffers):
        for name, tensor in tensors.items():
            setattr(norm, name, tensor.clone())
    try:
        yield
    finally:
        for norm, tensors in zip(norms, buffers):
            for name, tensor in tensors.items():
                setattr(norm, name, tensor)


def _live_norms(module: nn.Module) -> list[nn.Module]:
    """Norms whose running statistics a forward pass updates."""
    return [
        m
        for m in module.modules()
        if isinstance(m, _NormBase) and m.training and m.track_running_stats
    ]
