"""The sizes of ResT: the published variants, and checks of a user's own."""

from numbers import Integral, Real
from typing import NamedTuple, Union

NUM_STAGES = 4


class Arch(NamedTuple):
    """Sizes of the four stages."""

    embed_dims: tuple[int, ...]
    num_heads: tuple[int, ...]
    depths: tuple[int, ...]
    sr_ratios: tuple[int, ...]
    mlp_ratios: tuple[float, ...] = (4, 4, 4, 4)


# Table 1 of the paper
ARCHS: dict[str, Arch] = {
    'lite': Arch((64, 128, 256, 512), (1, 2, 4, 8), (2, 2, 2, 2), (8, 4, 2, 1)),
    'small': Arch((64, 128, 256, 512), (1, 2, 4, 8), (2, 2, 6, 2), (8, 4, 2, 1)),
    'base': Arch((96, 192, 384, 768), (1, 2, 4, 8), (2, 2, 6, 2), (8, 4, 2, 1)),
    'large': Arch((96, 192, 384, 768), (1, 2, 4, 8), (2, 2, 18, 2), (8, 4, 2, 1)),
}


def resolve_arch(arch: Union[str, dict]) -> Arch:
    """Return the sizes that a name or a dict stands for.

    Args:
        arch (str | dict): A key of ``ARCHS`` or a dict with the fields of
            :class:`Arch`; a single number as ``mlp_ratios`` holds for all stages.

    Raises:
        ValueError: If the name is unknown, or an entry of the dict is missing,
            unknown or inconsistent.
    """
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise ValueError(
                f'arch must be one of {", ".join(map(repr, ARCHS))} or a dict, '
                f'found {arch!r}'
            )
        return ARCHS[arch]
    if not isinstance(arch, dict):
        raise ValueError(f'arch must be a name or a dict, found {arch!r}')
    entries = dict(arch)
    if isinstance(entries.get('mlp_ratios'), Real):
        entries['mlp_ratios'] = [entries['mlp_ratios']] * NUM_STAGES

    required = set(Arch._fields) - set(Arch._field_defaults)
    missing = sorted(required - set(entries))
    unknown = sorted(map(str, set(entries) - set(Arch._fields)))
    if missing or unknown:
        raise ValueError(
            f'an arch dict has the entries {", ".join(Arch._fields)}; '
            f'missing: {", ".join(missing) or "none"}, '
            f'unknown: {", ".join(unknown) or "none"}'
        )
    for name, values in entries.items():
        _check_entry(name, values)
    resolved = Arch(**{name: tuple(values) for name, values in entries.items()})
    for stage, (dim, heads) in enumerate(
        zip(resolved.embed_dims, resolved.num_heads), start=1
    ):
        if dim % heads:
            raise ValueError(
                f'stage {stage}: embed_dims {dim} is not divisible by num_heads {heads}'
            )
    if resolved.embed_dims[0] % 2:
        raise ValueError(
            'embed_dims of stage 1 must be even (the stem starts with half of it), '
            f'found {resolved.embed_dims[0]}'
        )
    for stage, ratio in enumerate(resolved.sr_ratios, start=1):
        if ratio > 1 and ratio % 2:
            raise ValueError(
                f'stage {stage}: sr_ratios must be 1 or even, so that ratio r reduces '
                f'H to ceil(H / r), found {ratio}'
            )
    return resolved


def _check_entry(name: str, values: object) -> None:
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
