"""End a training at a NaN or infinite loss, with the reason and good checkpoints."""

from collections.abc import Iterator
from typing import Any, Optional

import torch
from mmengine.dist import all_gather_object, all_reduce
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner, find_latest_checkpoint
from torch import Tensor, nn

from .nonfinite_source import (
    abbreviate,
    find_source,
    nonfinite_parameters,
    rng_states,
)

_ADVICE = (
    'Usual cures: a lower learning rate, a longer warm-up, '
    'optim_wrapper.clip_grad=dict(max_norm=...), bfloat16 or float32 instead of '
    'float16, or other images, if it is always the same ones.'
)


class NonFiniteError(RuntimeError):
    """A loss or parameter is NaN or infinite."""


@HOOKS.register_module()
class CheckNonFiniteHook(Hook):
    """Stop at the first loss or parameter that is NaN or infinite.

    The losses of every iteration are checked between the forward and the backward
    pass, so that no step is made with them; the parameters are checked after every
    step, before anything is saved. Checkpoints on disk thus stay good. Infinite
    gradients alone end nothing: the dynamic loss scaling of float16 training makes
    them and skips their step.

    The error, on every process and in the log, says the iteration, and for each
    process the images of its batch and the first module that gave such a value,
    see :func:`mmrest.hooks.nonfinite_source.find_source`. mmdet's
    ``CheckInvalidLossHook`` says that there is a NaN, every 50 iterations.

    The cost is one more synchronisation with the GPU before the backward pass, and
    with several processes two messages of one number.

    Raises:
        NonFiniteError: At the iteration where it happens.
    """

    # before the hooks that average parameters or save them
    priority = 'HIGH'

    def __init__(self) -> None:
        self._handles: list = []
        self._batch: Any = None
        self._states: list[Tensor] = []

    def before_train(self, runner: Runner) -> None:
        """Watch what the model returns."""
        model = _unwrap(runner.model)

        def remember(module: nn.Module, args: tuple) -> None:
            self._states = rng_states()

        def check(module: nn.Module, args: tuple, kwargs: dict, losses: Any) -> None:
            if module.training and _in_loss_mode(args, kwargs):
                self._check_losses(runner, module, args, kwargs, losses)

        self._handles = [
            model.register_forward_pre_hook(remember),
            model.register_forward_hook(check, with_kwargs=True),
        ]

    def after_train(self, runner: Runner) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Keep the batch, whose samples know their images."""
        self._batch = data_batch

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Optional[dict] = None,
    ) -> None:
        """Check the parameters after the step."""
        model = _unwrap(runner.model)
        params = [param.detach() for param in model.parameters()]
        if not params:
            return
        # a sum of squares may also overflow, so a bad norm is only a suspicion
        suspicious = (
            not torch.stack([norm.float() for norm in torch._foreach_norm(params)])
            .isfinite()
            .all()
        )
        names = nonfinite_parameters(model) if suspicious else []
        if not _anywhere(bool(names), params[0].device):
            return
        self._stop(
            runner,
            'the step made parameters NaN or infinite, though the losses are finite: '
            'the gradients have overflowed',
            abbreviate(names) if names else 'all its parameters are finite',
        )

    def _check_losses(
        self, runner: Runner, model: nn.Module, args: tuple, kwargs: dict, losses: Any
    ) -> None:
        terms = _loss_terms(losses)
        if not terms:
            return
        total = sum(terms.values())
        bad = not bool(torch.isfinite(total))
        if not _anywhere(bad, total.device):
            return
        # every process searches, for a loss may talk to the other processes
        source = find_source(model, args, kwargs, self._states)
        if bad:
            values = [f'{name}={float(value):g}' for name, value in terms.items()]
            source = f'{", ".join(values)}; {source}'
        else:
            source = 'its losses are finite'
        self._stop(runner, 'a loss is NaN or infinite', source)

    def _stop(self, runner: Runner, what: str, source: str) -> None:
        images = ', '.join(_images(self._batch)) or 'without names'
        reports = all_gather_object(f'images {images}: {source}')
        lines = [f'iteration {runner.iter + 1}: {what}.']
        for rank, report in enumerate(reports):
            lines.append(f'  process {rank}, {report}')
        latest = find_latest_checkpoint(runner.work_dir)
        lines.append(
            f'The last checkpoint, {latest}, is from before.'
            if latest
            else 'There is no checkpoint yet.'
        )
        lines.append(_ADVICE)
        message = '\n'.join(lines)
        runner.logger.error(message)
        self.after_train(runner)
        raise NonFiniteError(message)


def _unwrap(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model


def _in_loss_mode(args: tuple, kwargs: dict) -> bool:
    modes = [kwargs.get('mode'), *(arg for arg in args if isinstance(arg, str))]
    return 'loss' in modes


def _loss_terms(losses: Any) -> dict[str, Tensor]:
    """What MMEngine's ``parse_losses`` sums: means, of entries named a loss."""
    terms = {}
    for name, value in losses.items() if isinstance(losses, dict) else ():
        values = value if isinstance(value, (list, tuple)) else [value]
        if 'loss' in name and values:
            terms[name] = sum(v.detach().float().mean() for v in values)
    return terms


def _anywhere(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is true on any process."""
    flags = torch.tensor(float(flag), device=device)
    all_reduce(flags, op='sum')
    return bool(flags > 0)


def _images(batch: Any) -> Iterator[str]:
    """Ids and files of the images, from the samples in any nest."""
    if isinstance(batch, dict):
        for item in batch.values():
            yield from _images(item)
    elif isinstance(batch, (list, tuple)):
        for item in batch:
            yield from _images(item)
    elif hasattr(batch, 'metainfo'):
        known = [batch.metainfo.get(key) for key in ('img_id', 'img_path')]
        if any(value is not None for value in known):
            yield ' '.join(str(value) for value in known if value is not None)
