"""End a training at a NaN or infinite loss, with the reason and intact checkpoints."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import torch
from mmengine.dist import all_gather_object, get_comm_device
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner, find_latest_checkpoint
from torch import Tensor, nn

from ..checkpoint import CheckpointError, read_checkpoint
from ..utils.delayed_flag import DelayedFlag
from ..utils.text import shorten

_ADVICE = (
    'Usual cures: a lower learning rate, a longer warm-up, '
    'optim_wrapper.clip_grad=dict(max_norm=...), bfloat16 or float32 instead of '
    'float16, or other images, if it is always the same ones.'
)


class NonFiniteError(RuntimeError):
    """A loss or parameter is NaN or infinite."""


class _Iteration(NamedTuple):
    """An iteration, for its report."""

    number: int
    batch: Any
    random_states: list[Tensor]
    losses: dict[str, Tensor]


@HOOKS.register_module()
class CheckNonFiniteHook(Hook):
    """Stop at the first loss or parameter that is NaN or infinite.

    Both are checked after every step. The result is read one iteration later, to avoid
    waiting for a GPU, or at once before a checkpoint or a validation. Checkpoints on
    the disk thus stay good. Infinite gradients alone do not end a run: the dynamic loss
    scaling of float16 training produces them and skips their step.

    The error, on all processes and in the log, names the iteration and, for each
    process, the images of its batch and the first module that returned such a value,
    see :func:`find_source`. mmdet's ``CheckInvalidLossHook`` only reports that there is
    a NaN, every 50 iterations.

    The model is not wrapped and gets no hooks, so that ``compile=`` of MMEngine's
    Runner gives the same graphs with and without this hook.

    Raises:
        NonFiniteError: After the next iteration, or before anything is saved.
    """

    # before the hooks that average parameters or save them
    priority = 'HIGH'

    def __init__(self) -> None:
        self._flag = DelayedFlag()
        self._sent: Optional[_Iteration] = None
        self._batch: Any = None
        self._states: list[Tensor] = []

    def before_train(self, runner: Runner) -> None:
        """Refuse initial parameters that are NaN or infinite."""
        self._flag, self._sent = DelayedFlag(), None
        model = _unwrap(runner.model)
        if any(all_gather_object(not _largest(model).isfinite())):
            names = nonfinite_parameters(model)
            raise NonFiniteError(
                'parameters are NaN or infinite before the first iteration: '
                f'{shorten(names, 5) or "those of another process"}. Look at what '
                'they were loaded from (load_from, init_cfg).'
            )

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Keep the batch and the random state for a report."""
        self._batch, self._states = data_batch, [torch.get_rng_state()]
        if torch.cuda.is_available():
            self._states.append(torch.cuda.get_rng_state())

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Optional[dict] = None,
    ) -> None:
        """Read the result of the last iteration, and check this one."""
        self.check(runner)
        losses = {
            name: value.detach().float().mean()
            for name, value in (outputs or {}).items()
            if 'loss' in name and isinstance(value, Tensor)
        }
        largest = _largest(_unwrap(runner.model))
        total = sum(losses.values(), largest.new_zeros(()))
        self._flag.send((~torch.stack([total, largest]).isfinite()).float())
        self._sent = _Iteration(runner.iter + 1, self._batch, self._states, losses)

    def before_val(self, runner: Runner) -> None:
        """Do not validate a broken model."""
        self.check(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Do not save a broken model, whoever saves it.

        MMEngine's own checkpoint hook calls this on the first process only. With
        several processes, the launcher then ends the others.
        """
        self.check(runner, alone=True)

    def after_train(self, runner: Runner) -> None:
        """Check the last iteration."""
        self.check(runner)

    def check(self, runner: Runner, alone: bool = False) -> None:
        """Read the result that is due; all processes must call it, unless ``alone``.

        Raises:
            NonFiniteError: If a loss or parameter of any process was not finite.
        """
        sent, self._sent = self._sent, None
        flags = self._flag.receive()
        if sent is None or not any(flags):
            return
        what = (
            'a loss is NaN or infinite'
            if flags[0]
            else 'the step made parameters NaN or infinite, though the losses are '
            'finite: the gradients have overflowed'
        )
        # on all processes, since a loss may communicate with the others
        source = _describe_source(runner, sent, of_losses=flags[0])
        images = ', '.join(_images(sent.batch)) or 'without names'
        report = f'images {images}: {source}'
        reports = [report] if alone else all_gather_object(report)
        latest = find_latest_checkpoint(runner.work_dir)
        lines = [f'iteration {sent.number}: {what}.']
        lines += [f'  process {rank}, {text}' for rank, text in enumerate(reports)]
        known = f'The last checkpoint, {latest}, is from before.'
        lines += [known if latest else 'There is no checkpoint yet.', _ADVICE]
        message = '\n'.join(lines)
        runner.logger.error(message)
        raise NonFiniteError(message)


def check_before_saving(runner: Runner) -> None:
    """Have ``CheckNonFiniteHook``, if there is one, read the result that is due.

    All processes must call this. It raises as :meth:`CheckNonFiniteHook.check`.
    """
    for hook in runner.hooks:
        if isinstance(hook, CheckNonFiniteHook):
            hook.check(runner)


def _describe_source(runner: Runner, sent: _Iteration, of_losses: bool) -> str:
    model = _unwrap(runner.model)
    broken = nonfinite_parameters(model)
    if not of_losses:
        return shorten(broken, 5) if broken else 'all its parameters are finite'
    if all(map(torch.isfinite, sent.losses.values())):
        return 'its losses are finite'
    weights: Optional[dict[str, Tensor]] = {}
    note = ''
    if broken:  # by the step that was made with this loss
        weights, latest = None, find_latest_checkpoint(runner.work_dir)
        note = ' (the step made with this loss has broken the parameters)'
        if latest is not None:
            try:
                weights = read_checkpoint(latest)['state_dict']
                note = f' (with the weights of {latest})'
            except (CheckpointError, KeyError) as error:
                note = f' ({latest} cannot be read: {error})'
    with runner.optim_wrapper.optim_context(runner.model):
        found = find_source(model, sent.batch, sent.random_states, weights)
    values = ', '.join(f'{name}={float(v):g}' for name, v in sent.losses.items())
    return f'{values}; {found}{note}'


def _unwrap(model: Any) -> Any:
    return model.module if is_model_wrapper(model) else model


def _images(batch: Any) -> Iterator[str]:
    """Ids and files of the images of a batch, which may be nested."""
    if isinstance(batch, (dict, list, tuple)):
        for item in batch.values() if isinstance(batch, dict) else batch:
            yield from _images(item)
    elif hasattr(batch, 'metainfo'):
        named = [batch.metainfo.get(key) for key in ('img_id', 'img_path')]
        known = [str(value) for value in named if value is not None]
        if known:
            yield ' '.join(known)


# ------------------------------------------------------- the search for the source


def _largest(model: nn.Module) -> Tensor:
    """The largest absolute value of all parameters; NaN if any is NaN."""
    params = [
        param.detach()
        for param in model.parameters()
        if param.is_floating_point() and param.numel()
    ]
    if not params:  # with FSDP, a process may have none
        return torch.zeros((), device=get_comm_device())
    norms = torch._foreach_norm(params, float('inf'))
    return torch.stack([norm.float() for norm in norms]).amax()


def nonfinite_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters with a NaN or infinite value."""
    return [
        name
        for name, param in model.named_parameters()
        if not torch.isfinite(param.detach()).all()
    ]


def find_source(
    model: Any,
    batch: Any,
    random_states: list[Tensor],
    weights: Optional[dict[str, Tensor]],
) -> str:
    """Find the first NaN or infinite value in a training iteration.

    The inputs are checked first. A second pass without gradients then checks the inputs
    and outputs of each module. The run must be over: the random state changes, and the
    statistics of BatchNorm may change too.

    Args:
        model (BaseModel): The model without its wrapper.
        batch (Any): The batch from the data loader.
        random_states (list[Tensor]): Of the CPU and the current GPU, before the pass.
        weights (dict[str, Tensor], optional): Tensors to use instead of the model's
            parameters and buffers. If None, only the inputs are checked.
    """
    handles = _watch(model)
    try:
        torch.set_rng_state(random_states[0])
        if len(random_states) > 1:
            torch.cuda.set_rng_state(random_states[1])
        with torch.no_grad():
            data = model.data_preprocessor(batch, True)
            count = _first_count(data.get('inputs') if isinstance(data, dict) else data)
            if count:
                return f'already in the preprocessed inputs: {count}'
            if weights is None:
                return 'the preprocessed inputs are finite'
            device = next(model.parameters()).device
            moved = {name: value.to(device) for name, value in weights.items()}
            args, kwargs = ((), data) if isinstance(data, dict) else (tuple(data), {})
            kwargs = dict(kwargs, mode='loss')
            torch.func.functional_call(model, moved, args, kwargs, strict=False)
    except _Found as found:
        return str(found)
    except Exception as error:  # must not hide the reason of the stop
        return f'the batch could not be run again ({error!r})'
    finally:
        for handle in handles:
            handle.remove()
    return 'no module gave such a value when the batch was run again'


class _Found(Exception):
    """Ends the second pass, and says where."""


def _watch(model: nn.Module) -> list:
    """Add hooks that raise at the first NaN or infinite value."""
    modules = dict(model.named_modules())
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def entering(_: nn.Module, args: tuple, kwargs: dict) -> None:
            count = _first_count((args, kwargs))
            if count:
                maker = _describe(_parent(name, modules), modules)
                raise _Found(
                    f'first in {maker}, by its own operations: it hands {name} {count}'
                )

        def leaving(_: nn.Module, args: tuple, output: Any) -> None:
            count = _first_count(output)
            if count:
                maker = _describe(name, modules)
                raise _Found(f'first in {maker}, from inputs that are finite: {count}')

        handles.append(module.register_forward_pre_hook(entering, with_kwargs=True))
        handles.append(module.register_forward_hook(leaving))

    for name, module in modules.items():
        if name and not name.startswith('data_preprocessor'):
            watch(name, module)
    return handles


def _parent(name: str, modules: dict[str, nn.Module]) -> str:
    """The module whose code calls ``name``; lists of modules have no code."""
    name = name.rpartition('.')[0]
    while name and isinstance(modules[name], (nn.ModuleList, nn.ModuleDict)):
        name = name.rpartition('.')[0]
    return name


def _describe(name: str, modules: dict[str, nn.Module]) -> str:
    kind = type(modules[name]).__name__
    return f'{name} ({kind})' if name else f'the model itself ({kind})'


def _first_count(value: Any) -> Optional[str]:
    """Count NaN and infinite values in the first tensor that has any."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (list, tuple)):
        return next((count for count in map(_first_count, value) if count), None)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    nans, infs = int(value.isnan().sum()), int(value.isinf().sum())
    if not nans and not infs:
        return None
    return f'{nans} NaN and {infs} infinite values of {value.numel()}'
