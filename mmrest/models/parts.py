"""The places of ResT that can be filled otherwise: stem, position, attention.

Each has a registry with the variants that the paper compares. A variant of one's
own is registered there and named in the config like the others.
"""

import inspect
from typing import Any, Union

from mmengine.registry import MODELS, Registry
from torch import nn

# Built with in_channels, dim, norm_cfg and pos; maps an image (B, in_channels, H, W)
# to pos(map), of shape (B, dim, ceil(H / 4), ceil(W / 4)).
STEMS = Registry('ResT stem')

# Built with dim and map_stride, as far as the constructor takes them; maps a map
# (B, dim, H, W) to one of the same shape.
POSITIONS = Registry('ResT position')

# Built with dim, num_heads, sr_ratio, qkv_bias, attn_drop, proj_drop and attn_impl;
# maps tokens (B, H * W, dim) and the size (H, W) to tokens of the same shape.
ATTENTIONS = Registry('ResT attention')

# What constructors call the channels of the map.
CHANNELS = ('dim', 'in_channels', 'channels', 'embed_dims', 'num_channels')

PartCfg = Union[str, dict]


def build_part(
    registry: Registry, argument: str, cfg: PartCfg, **given: Any
) -> nn.Module:
    """Build a variant of a registry.

    Args:
        registry (Registry): One of the above.
        argument (str): The argument of ResT that ``cfg`` is, for messages.
        cfg (str | dict): A name, or a dict with ``type`` and options.
        **given: What every variant of this registry is built with.

    Raises:
        ValueError: If the name is unknown or an option does not fit.
    """
    kind, options = _split(registry, argument, cfg)
    cls = registry.module_dict.get(kind) if isinstance(kind, str) else kind
    if cls is None:
        raise ValueError(f'{argument} must be {_known(registry)}, found {kind!r}')
    return _construct(argument, kind, cls, {**given, **options})


def build_position(cfg: PartCfg, dim: int, map_stride: int) -> nn.Module:
    """Build the positional encoding of a stage.

    Args:
        cfg (str | dict): A name in ``POSITIONS``, or any module registered in
            MMEngine's ``MODELS`` that maps a map to one of the same shape, alone
            or as ``type`` of a dict with options. Its constructor gets the
            channels under the first of the names in ``CHANNELS`` that it has.
        dim (int): Channels of the map.
        map_stride (int): Pixels of the image from one entry of the map to the
            next.

    Raises:
        ValueError: If the name is unknown or an option does not fit.
    """
    kind, options = _split(POSITIONS, 'pos_cfg', cfg)
    cls = POSITIONS.module_dict.get(kind) if isinstance(kind, str) else kind
    if cls is None:
        # as MODELS.build does: the default scope's registry comes first
        with MODELS.switch_scope_and_registry(None) as models:
            cls = models.get(kind)
    if cls is None:
        raise ValueError(
            f"pos_cfg must be {_known(POSITIONS)}, or a module in MMEngine's MODELS, "
            f'found {kind!r}'
        )
    taken = inspect.signature(cls).parameters
    given = {name: dim for name in CHANNELS if name in taken}
    given = dict(list(given.items())[:1])
    if 'map_stride' in taken:
        given['map_stride'] = map_stride
    return _construct('pos_cfg', kind, cls, {**given, **options})


def is_own_position(module: nn.Module) -> bool:
    """Whether a positional encoding is one of ``POSITIONS``."""
    return type(module) in POSITIONS.module_dict.values()


def _split(
    registry: Registry, argument: str, cfg: PartCfg
) -> tuple[Union[str, type], dict]:
    options = dict(type=cfg) if isinstance(cfg, str) else cfg
    kind = options.get('type') if isinstance(options, dict) else None
    if not isinstance(kind, (str, type)):
        raise ValueError(
            f"{argument} must be {_known(registry)}, or a dict with such a 'type', "
            f'found {cfg!r}'
        )
    return kind, {key: value for key, value in options.items() if key != 'type'}


def _construct(
    argument: str, kind: Union[str, type], cls: type, kwargs: dict
) -> nn.Module:
    try:
        return cls(**kwargs)
    except TypeError as error:
        raise ValueError(
            f'{argument}: {kind!r} cannot be built with {", ".join(kwargs)}: {error}'
        ) from error


def _known(registry: Registry) -> str:
    return f'one of {", ".join(map(repr, registry.module_dict))}'
