"""FullyShardedDataParallel of models with ResT, through MMEngine's FlexibleRunner."""

from typing import Any, Optional, Union

import torch
from mmengine._strategy import FSDPStrategy
from mmengine.device import get_device
from mmengine.optim import BaseOptimWrapper
from mmengine.registry import FUNCTIONS, STRATEGIES
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ..models.rest import Block


@FUNCTIONS.register_module()
def rest_block_wrap_policy(
    module: nn.Module, recurse: bool, nonwrapped_numel: int
) -> bool:
    """Make every block of ResT an FSDP unit, and the rest of the model another one.

    For ``auto_wrap_policy`` of MMEngine's ``MMFullyShardedDataParallel``. The
    parameters of one block at a time are gathered for its forward and backward pass.
    ``recurse`` asks whether to look into the module, instead of whether to wrap it.
    """
    return recurse or isinstance(module, Block)


@STRATEGIES.register_module()
class BlockFSDPStrategy(FSDPStrategy):
    """MMEngine's ``FSDPStrategy`` with blocks of ResT as units, which can be resumed.

    It differs from ``FSDPStrategy`` as follows:

    - Every block is a unit, see :func:`rest_block_wrap_policy`, unless
      ``model_wrapper`` has an ``auto_wrap_policy``.
    - A checkpoint is one file with the whole state, which a model without FSDP can
      load.
    - The state of the optimizer is loaded. MMEngine 0.10.7 passes arguments in an order
      that torch has dropped in 2.1, so that resuming fails.
    - It also runs on CPUs with gloo. There, each process gathers the whole state to
      save it; on GPUs the first one does, into main memory.
    - ``optim_wrapper.clip_grad`` clips by the norm of the whole gradient, where
      MMEngine uses that of a process's part.

    Accumulated gradients are not saved in a checkpoint, see
    :class:`mmrest.hooks.AtomicCheckpointHook`.

    Args:
        model_wrapper (dict, optional): Fields of ``MMFullyShardedDataParallel``.
        state_dict_cfg (str | dict): As for ``FSDPStrategy``. Default: ``'full'``.
        **kwargs: As for ``FSDPStrategy``.
    """

    def __init__(
        self,
        *,
        model_wrapper: Optional[dict] = None,
        state_dict_cfg: Union[str, dict] = 'full',
        **kwargs: Any,
    ) -> None:
        model_wrapper = dict(model_wrapper or {})
        model_wrapper.setdefault('type', 'MMFullyShardedDataParallel')
        model_wrapper.setdefault('auto_wrap_policy', 'rest_block_wrap_policy')
        on_cpu = get_device() == 'cpu'
        if on_cpu:
            # MMEngine's default is a number, which means a GPU
            model_wrapper.setdefault('device_id', torch.device('cpu'))
        super().__init__(
            model_wrapper=model_wrapper, state_dict_cfg=state_dict_cfg, **kwargs
        )
        if on_cpu and state_dict_cfg == 'full':
            # when offloading from a CPU, torch 2.13 frees the tensors and crashes
            for config in (self.state_dict_config, self.optim_state_dict_config):
                config.rank0_only = config.offload_to_cpu = False

    def build_optim_wrapper(
        self, optim_wrapper: Any, model: Optional[nn.Module] = None
    ) -> BaseOptimWrapper:
        """Build the optimizer, with clipping by the norm over all processes.

        Raises:
            ValueError: If ``clip_grad`` has options that FSDP does not support.
        """
        wrapper = super().build_optim_wrapper(optim_wrapper, model)
        options = getattr(wrapper, 'clip_grad_kwargs', None)
        # clipping by value needs no norm, and works on parts
        if options and wrapper.grad_name == 'grad_norm':
            unknown = sorted(options.keys() - {'max_norm', 'norm_type'})
            if unknown:
                raise ValueError(
                    f'optim_wrapper.clip_grad has {", ".join(unknown)}, which clipping '
                    'with FSDP does not know. Only give max_norm and norm_type.'
                )
            wrapper.clip_func = self._clip_grad_norm
        return wrapper

    def _clip_grad_norm(self, params: list, **options: Any) -> torch.Tensor:
        return self.model.clip_grad_norm_(**options)

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Load the entry ``optimizer`` of a checkpoint.

        It may come from this strategy, or from a run without FSDP and with the same
        config.
        """
        names = self._names_of_optimizer()
        state_dict = dict(
            state={
                names[key] if isinstance(key, int) else key: value
                for key, value in state_dict['state'].items()
            },
            param_groups=[
                dict(
                    group,
                    params=[
                        names[key] if isinstance(key, int) else key
                        for key in group['params']
                    ],
                )
                for group in state_dict['param_groups']
            ],
        )
        state = FullyShardedDataParallel.optim_state_dict_to_load(
            model=self.model,
            optim=self.optim_wrapper.optimizer,
            optim_state_dict=state_dict,
        )
        self.optim_wrapper.load_state_dict(state)

    def _names_of_optimizer(self) -> list[str]:
        """Names of the parameters, in the order in which other optimizers use them."""
        names = {
            id(param): name.replace('_fsdp_wrapped_module.', '')
            for name, param in self.model.named_parameters()
        }
        groups = self.optim_wrapper.optimizer.param_groups
        return [names[id(param)] for group in groups for param in group['params']]
