"""Layer-wise learning-rate decay for backbones that know their layers.

The constructors of mmdet and mmseg support a few backbones by name, and mmpretrain's
supports its own classifiers. This one asks the backbone's ``get_layer_depth``, as
mmpretrain's does, and otherwise is MMEngine's default constructor.
"""

from collections.abc import Callable
from typing import Optional, Union

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

# method of a backbone that returns the depth of a parameter
_DEPTHS = dict(layer_wise='get_layer_depth', stage_wise='get_stage_depth')
# parts of names from FullyShardedDataParallel and activation checkpointing
_WRAPPERS = ('_fsdp_wrapped_module.', '_checkpoint_wrapped_module.')


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Scale the learning rate of each layer by ``layer_decay_rate`` per layer above it.

    Of L layers, layer i has ``layer_decay_rate ** (L - 1 - i)`` times the learning
    rate. The last one, which includes output norms, necks and heads, has the full rate.
    Each parameter has its own group with the fields ``lr_scale``, ``layer_id`` and
    ``param_name``, as in mmpretrain.

    Args:
        optim_wrapper_cfg (dict): Config of the optimizer wrapper, whose optimizer has
            an ``lr``.
        paramwise_cfg (dict): ``layer_decay_rate`` (float), above 0 and at most 1;
            ``decay_type`` (str), ``'layer_wise'`` (default) or ``'stage_wise'``, which
            treats the blocks of a stage and the next patch embedding as one layer; and
            any option of MMEngine's ``DefaultOptimWrapperConstructor``, such as
            ``norm_decay_mult``, ``bias_decay_mult`` or ``custom_keys``, whose
            ``lr_mult`` is multiplied with the factor of the layer.

    Raises:
        ValueError: If one of the rates is missing or invalid, or if no part of the
            model has ``get_layer_depth``.

    Example:
        >>> optim_wrapper = dict(
        ...     type='OptimWrapper',
        ...     constructor='LayerDecayOptimWrapperConstructor',
        ...     optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
        ...     paramwise_cfg=dict(layer_decay_rate=0.9, norm_decay_mult=0.0),
        ... )
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        rate = self.paramwise_cfg.get('layer_decay_rate')
        is_number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
        if not is_number or not 0 < rate <= 1:
            raise ValueError(
                'paramwise_cfg of LayerDecayOptimWrapperConstructor needs '
                f'layer_decay_rate, a number above 0 and at most 1, found {rate!r}'
            )
        kind = self.paramwise_cfg.get('decay_type', 'layer_wise')
        if kind not in _DEPTHS:
            raise ValueError(
                'decay_type of LayerDecayOptimWrapperConstructor must be one of '
                f'{", ".join(map(repr, _DEPTHS))}, found {kind!r}'
            )
        if self.base_lr is None:
            raise ValueError(
                'LayerDecayOptimWrapperConstructor multiplies the learning rate: give '
                'the optimizer an lr'
            )

    def add_params(
        self,
        params: list[dict],
        module: nn.Module,
        prefix: str = '',
        is_dcn_module: Optional[Union[int, float]] = None,
    ) -> None:
        """Append a group for each parameter; see MMEngine's constructor."""
        super().add_params(params, module, prefix, is_dcn_module)
        if prefix == '':  # MMEngine also calls this for each part of the model
            self._scale_by_layer(params, module)

    def _scale_by_layer(self, params: list[dict], model: nn.Module) -> None:
        method = _DEPTHS[self.paramwise_cfg.get('decay_type', 'layer_wise')]
        owners = _find_owners(model, method)
        if not owners:
            raise ValueError(
                f'{type(model).__name__} has no part with {method}, which '
                'layer-wise learning-rate decay asks for the layer of a parameter. '
                'ResT has it; for another backbone use the default constructor.'
            )
        rate = self.paramwise_cfg['layer_decay_rate']
        names = {id(param): _clean(name) for name, param in model.named_parameters()}
        for group in params:
            name = names[id(group['params'][0])]
            layer_id, num_layers = _layer_of(name, owners)
            scale = rate ** (num_layers - 1 - layer_id)
            group['lr'] = group.get('lr', self.base_lr) * scale
            group.update(lr_scale=scale, layer_id=layer_id, param_name=name)
        for scale in sorted({group['lr_scale'] for group in params}):
            count = sum(group['lr_scale'] == scale for group in params)
            print_log(f'lr x {scale:.3g}: {count} parameters', logger='current')


def _clean(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, '')
    return name


def _find_owners(model: nn.Module, method: str) -> dict[str, Callable]:
    """The methods of the parts that have it, by prefix, outer parts first."""
    return {
        _clean(f'{name}.') if name else '': getattr(module, method)
        for name, module in model.named_modules()
        if hasattr(module, method)
    }


def _layer_of(name: str, owners: dict[str, Callable]) -> tuple[int, int]:
    for prefix, get_depth in owners.items():
        if name.startswith(prefix):
            return get_depth(name[len(prefix) :])
    # necks and heads are in the last layer of the first backbone
    _, num_layers = next(iter(owners.values()))('')
    return num_layers - 1, num_layers
