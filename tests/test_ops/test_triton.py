"""The Triton kernels: on a GPU where there is one, else in Triton's interpreter.

The interpreter must be chosen before Triton is imported, so a process of its own
runs this file again there. What the interpreter cannot show, registers and shared
memory, is read from kernels compiled ahead of time, which needs no GPU either.
"""

import contextlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from attention_cases import Shape, make_inputs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mmrest.ops import head_interaction_attention
from mmrest.ops import triton_head_interaction as kernels
from mmrest.ops.triton_head_interaction import why_not

triton = pytest.importorskip('triton', reason='needs Triton')
if kernels.TRITON_VERSION < kernels.MIN_TRITON:
    pytest.skip('needs a newer Triton', allow_module_level=True)

DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
runs_kernels = pytest.mark.skipif(
    DEVICE.type == 'cpu' and not INTERPRETED,
    reason='needs CUDA; test_in_the_interpreter runs it in a process of its own',
)
needs_cuda = pytest.mark.skipif(DEVICE.type == 'cpu', reason='needs CUDA')
compiles = pytest.mark.skipif(INTERPRETED, reason='needs no interpreter')

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALVES = DTYPES[1:]
# blocks hold 128 or 256 keys and 4 rows
SHAPES = [
    Shape(2, 1, 7, 63, 32),
    Shape(1, 2, 21, 7, 48),
    Shape(3, 3, 1, 260, 64),
    Shape(1, 4, 6, 150, 96),
    Shape(1, 8, 5, 140, 128),
    Shape(1, 5, 6, 20, 10),
]
# the interpreter takes half a second for a program of these
QUERIES = 1050 if DEVICE.type == 'cuda' else 10
LARGE_SHAPES = [
    Shape(2, 2, QUERIES, 1050, 96),
    Shape(1, 3, QUERIES, 1050, 128),
    Shape(2, 4, QUERIES, 1050, 64),
    Shape(1, 8, QUERIES, 1050, 48),
]


def with_dtypes(values):
    """Each value in each type on a GPU, in one type in the interpreter, in turn."""
    if DEVICE.type == 'cuda':
        return list(itertools.product(values, DTYPES))
    return list(zip(values, itertools.cycle(DTYPES)))


SINGLE_KEY = [Shape(2, 2, 7, 1, 32), Shape(1, 4, 1, 1, 64)]


@pytest.mark.skipif(DEVICE.type == 'cuda', reason='the kernels run on this GPU')
@pytest.mark.skipif(INTERPRETED, reason='is in the interpreter')
@pytest.mark.parametrize(
    'speed', ['not slow', pytest.param('slow', marks=pytest.mark.slow)]
)
def test_in_the_interpreter(speed, repo):
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-m', speed]
        + [str(Path(__file__).resolve())],
        cwd=repo,
        env={**os.environ, 'TRITON_INTERPRET': '1', 'PYTHONPATH': str(repo)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    assert re.search(r'\d+ passed', done.stdout), done.stdout


class Case:
    """Inputs of one call in one type, and the exact results."""

    def __init__(self, shape, dtype, scores=1.0, grad=1.0, seed=0):
        inputs = make_inputs(shape, torch.float64, seed)
        self.dtype, self.scale = dtype, shape.dim**-0.5
        # q k^T of standard normal numbers has the size of sqrt(d)
        side = (scores / (self.scale * shape.dim**0.5)) ** 0.5
        rng = torch.Generator().manual_seed(seed + 1)
        size = (shape.batch, shape.heads, shape.queries, shape.dim)
        drawn = torch.randn(*size, generator=rng, dtype=torch.float64) * grad
        self.q, self.k, self.v = (
            (inputs[name].detach() * factor).to(DEVICE, dtype)
            for name, factor in zip('qkv', (side, side, 1.0))
        )
        self.weight = inputs['weight'].detach()[:, :, 0, 0].to(DEVICE, torch.float32)
        self.bias = inputs['bias'].detach().to(DEVICE, torch.float32)
        self.grad = drawn.to(DEVICE, dtype)

    def run(self, function, dtype=None, layout=None):
        """Output and gradients, all inputs in ``dtype`` if it is given."""
        tensors = [self.q, self.k, self.v, self.weight, self.bias]
        if dtype is not None:
            tensors = [tensor.to(dtype) for tensor in tensors]
        grad = self.grad
        if layout is not None:
            tensors[:3] = [layout(tensor) for tensor in tensors[:3]]
            grad = layout(grad)
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out = function(*leaves)
        grads = torch.autograd.grad(
            out, leaves, grad.to(out.dtype), materialize_grads=True
        )
        names = ('out', 'q', 'k', 'v', 'weight', 'bias')
        return dict(zip(names, (out.detach(), *grads)))

    def dense(self, dtype=None):
        """As the definition computes it; half precision as under autocast."""
        half = dtype is None and self.dtype in HALVES
        with torch.autocast(DEVICE.type, self.dtype if half else None, enabled=half):
            return self.run(
                lambda *x: head_interaction_attention(*x, attn_impl='dense'), dtype
            )

    def triton(self, tile_rows=None, layout=None):
        assert why_not(self.q, self.k, self.v) is None
        options = dict(attn_impl='triton', tile_rows=tile_rows)
        return self.run(
            lambda *x: head_interaction_attention(*x, **options), layout=layout
        )

    def floors(self) -> dict[str, float]:
        """What rounding may leave of a result that is 0 in theory."""
        q, k, v, grad = (
            float(x.abs().max().double()) for x in (self.q, self.k, self.v, self.grad)
        )
        # r, at most eps ** -0.5, multiplies what float32 rounds in between
        eps = torch.finfo(self.dtype).eps + 316 * torch.finfo(torch.float32).eps
        # the largest product of a row of G and one of v
        product = grad * v * self.q.shape[-1]
        return {
            'out': eps * v,
            'q': eps * self.scale * product * k,
            'k': eps * self.scale * product * q,
            # each p is rounded, and r (p - 1 / M) G summed over N rows, in B h M d sums
            'v': eps * grad
            + 316
            * torch.finfo(torch.float32).eps
            * grad
            * (self.q.shape[2] / self.k.shape[2] * self.v.numel() ** 0.5),
            'weight': eps * product * q * k,
        }

    def check(self, found: dict[str, Tensor], factor: float = 5.0) -> None:
        """No further from the exact results than ``factor`` times dense is."""
        exact, dense = self.dense(torch.float64), self.dense()
        for name, floor in self.floors().items():
            assert found[name].shape == exact[name].shape, name
            distances = [
                (x[name].double() - exact[name]).norm() for x in (found, dense)
            ]
            bound = factor * distances[1] + floor
            assert distances[0] <= bound, (name, *distances, floor)
        assert not found['bias'].any(), 'the bias cancels: its gradient is 0'


@runs_kernels
@pytest.mark.parametrize('shape, dtype', with_dtypes(SHAPES), ids=str)
def test_equals_dense(shape, dtype):
    case = Case(shape, dtype)
    case.check(case.triton())


@runs_kernels
@pytest.mark.slow
@pytest.mark.parametrize('shape, dtype', with_dtypes(LARGE_SHAPES), ids=str)
def test_equals_dense_at_large_sizes(shape, dtype):
    case = Case(shape, dtype)
    case.check(case.triton())


@runs_kernels
@pytest.mark.parametrize('tile_rows, dtype', with_dtypes([2, 7, 7]), ids=str)
def test_tiles(tile_rows, dtype):
    case = Case(Shape(2, 2, 9, 40, 8), dtype)
    case.check(case.triton(tile_rows))


@runs_kernels
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('shape', SINGLE_KEY, ids=str)
def test_nothing_comes_of_a_single_key(shape, dtype):
    """Its map is constant, and r multiplies what is left by 316."""
    case = Case(shape, dtype)
    for name, tensor in case.triton().items():
        floor = case.floors().get(name, 0.0)
        assert float(tensor.abs().max()) <= floor, (name, tensor, floor)


@runs_kernels
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('scores', [0.01, 30.0])
def test_flat_and_concentrated_attention(scores, dtype):
    case = Case(Shape(1, 4, 20, 60, 32), dtype, scores)
    case.check(case.triton())


@runs_kernels
@pytest.mark.parametrize('queries, tile_rows', [(256, None), (300, 256)])
def test_long_sums_are_cut_into_parts(queries, tile_rows):
    case = Case(Shape(1, 1, queries, 3, 4), torch.float16)
    case.check(case.triton(tile_rows))


@runs_kernels
@pytest.mark.parametrize(
    'layout',
    [
        lambda x: x.contiguous(),
        lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: x[:, :, :1, :1].expand(x.shape),
    ],
    ids=['contiguous', 'strided', 'transposed', 'expanded'],
)
def test_any_memory_layout(layout):
    case = Case(Shape(2, 4, 9, 10, 8), torch.float32)
    for name in ('q', 'k', 'v', 'grad'):
        setattr(case, name, layout(getattr(case, name)).contiguous())
    case.check(case.triton(layout=layout))


@runs_kernels
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
def test_same_result_in_every_run(dtype):
    case = Case(Shape(2, 4, 8, 150, 16), dtype)
    first, second = case.triton(), case.triton()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@runs_kernels
def test_autocast_changes_no_product():
    case = Case(Shape(1, 2, 6, 20, 16), torch.float32)
    expected = case.triton()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = case.triton()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@runs_kernels
def test_gradients_as_large_as_float16_holds():
    """r, 316 at most, multiplies nothing that is stored in half precision."""
    case = Case(Shape(1, 2, 8, 1050, 32), torch.float16, scores=0.1, grad=400.0)
    product = (case.grad.double() @ case.v.double().mT).abs().max()
    assert product < torch.finfo(torch.float16).max < 100 * product
    found = case.triton()
    exact = case.dense(torch.float64)
    for name in ('q', 'k', 'v', 'weight'):
        error = (found[name].double() - exact[name]).norm() / exact[name].norm()
        assert error < 0.02, (name, error)


@runs_kernels
def test_scores_are_scaled_before_they_are_rounded():
    case = Case(Shape(1, 2, 16, 20, 64), torch.float16, scores=3000.0)
    product = (case.q.double() @ case.k.double().mT).abs().max()
    assert product > torch.finfo(torch.float16).max > product * case.scale
    assert all(tensor.isfinite().all() for tensor in case.triton().values())


@runs_kernels
def test_overflow_is_seen_and_not_swallowed():
    case = Case(Shape(1, 2, 8, 40, 32), torch.float16, grad=60000.0)
    found = case.triton()
    for name in ('q', 'k', 'v', 'weight'):
        assert not found[name].isfinite().all(), name


@runs_kernels
def test_no_images():
    case = Case(Shape(0, 2, 6, 4, 8), torch.float32)
    found = case.triton()
    assert found['out'].shape == found['q'].shape == (0, 2, 6, 8)
    assert not found['weight'].any()


@runs_kernels
def test_operator_is_well_formed():
    case = Case(Shape(1, 2, 6, 5, 8), torch.float32)
    tensors = [x.requires_grad_() for x in (case.q, case.k, case.v, case.weight)]
    operator = torch.ops.mmrest.triton_head_interaction_attention.default
    torch.library.opcheck(operator, (*tensors, case.bias, 0.5, 1e-5, None))


@runs_kernels
def test_compiles_whole():
    torch._dynamo.reset()
    case = Case(Shape(1, 2, 6, 5, 8), torch.float32)

    def function(*x):
        return head_interaction_attention(*x, attn_impl='triton') * 2

    compiled = torch.compile(function, fullgraph=True, backend='aot_eager')
    expected, found = case.run(function), case.run(compiled)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name])


@runs_kernels
def test_compiled_autograd_meets_the_operator():
    """It traces backward passes of what ran in eager mode."""
    from torch._dynamo import compiled_autograd

    torch._dynamo.reset()
    case = Case(Shape(1, 2, 6, 5, 8), torch.float32)
    expected = case.triton()

    def function(*x):
        return head_interaction_attention(*x, attn_impl='triton')

    with compiled_autograd._enable(torch.compile(backend='eager', fullgraph=True)):
        found = case.run(function)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name])


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_fake_tensors_stay_on_their_device(dtype):
    operators = torch.ops.mmrest
    backward = operators.triton_head_interaction_attention_backward
    with torch.no_grad(), FakeTensorMode():
        q, k = (torch.empty(2, 4, n, 32, device='cuda', dtype=dtype) for n in (9, 7))
        weight = torch.empty(4, 4, device='cuda')
        out, statistics, gain = operators.triton_head_interaction_attention(
            q, k, k, weight, None, 0.5, 1e-5, None
        )
        grads = backward(out, q, k, k, weight, out, statistics, gain, 0.5, None)
        chosen = head_interaction_attention(q, k, k, weight, attn_impl='triton')
    for found, given in zip((out, chosen, *grads), (q, q, q, k, k, weight)):
        assert found.device.type == 'cuda'
        assert (found.shape, found.dtype) == (given.shape, given.dtype)
    assert out.stride() == (9 * 4 * 32, 32, 4 * 32, 1)


@runs_kernels
def test_second_order_gradients_are_refused():
    case = Case(Shape(1, 2, 5, 4, 8), torch.float32)
    q = case.q.requires_grad_()
    out = head_interaction_attention(q, case.k, case.v, case.weight, attn_impl='triton')
    (grad_q,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="attn_impl='dense'"):
        grad_q.sum().backward()


@pytest.mark.parametrize(
    'size, dtype, options, reason',
    [
        ((1, 9, 4), torch.float32, {}, 'up to 8 heads, found 9'),
        ((8192, 8, 1), torch.float32, {}, 'up to 65535 images times heads'),
        ((1, 2, 0), torch.float32, {}, 'at least one key'),
        ((1, 2, 4), torch.float64, {}, 'float32, float16, bfloat16, found float64'),
        ((1, 2, 4), torch.float32, dict(dropout_p=0.1), 'dropout_p=0.1'),
    ],
)
def test_what_the_kernels_cannot_do(size, dtype, options, reason):
    batch, heads, keys = size
    q, k = (
        torch.zeros(batch, heads, n, 8, dtype=dtype, device='meta') for n in (1, keys)
    )
    assert why_not(q, k, k) == 'it needs tensors on an NVIDIA GPU, found meta'
    q, k = (torch.empty_like(x, device=DEVICE) for x in (q, k))
    if DEVICE.type == 'cpu' and not INTERPRETED:
        assert why_not(q, k, k) == 'it needs tensors on an NVIDIA GPU, found cpu'
    else:
        assert reason in why_not(q, k, k, **options)


@compiles
@pytest.mark.slow
def test_without_triton():
    """In a process where its import fails, as with PyTorch for CPUs."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        'import torch\n'
        'from mmrest.ops import triton_head_interaction as kernels\n'
        'x = torch.zeros(1, 2, 3, 4)\n'
        "assert kernels.why_not(x, x, x) == 'Triton is not installed'\n"
        'assert not kernels.is_available()\n'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@runs_kernels
@pytest.mark.skipif(not INTERPRETED, reason='is about the interpreter')
def test_the_interpreter_takes_tensors_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda index: (9, 0))
    assert kernels._find_device_problem.__wrapped__('cuda', 0) is None


def test_a_machine_that_cannot_compile(monkeypatch):
    class Broken:
        def warmup(self, *args, **kwargs):
            raise RuntimeError('Failed to find C compiler.\nSet CC.')

    monkeypatch.setattr(kernels, 'gain_kernel', Broken())
    monkeypatch.setattr(torch.cuda, 'device', contextlib.nullcontext)
    assert kernels._find_compiler_problem(0) == (
        'Triton cannot compile kernels here (RuntimeError: Failed to find C compiler.)'
    )


@needs_cuda
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_memory_does_not_grow_with_the_maps(dtype):
    shape = Shape(1, 4, 32768, 4096, 32)
    tile_bytes = kernels.GPU_TILE_BYTES
    case = Case(shape, dtype)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case.triton()
    peak = torch.cuda.max_memory_allocated() - before
    # of 2 GiB maps, two tiles in float32; tensors of all queries take 16 MiB
    assert peak < 2 * tile_bytes + 256 * 2**20, peak / 2**20


@needs_cuda
def test_waits_for_nothing_and_fits_into_a_graph():
    case = Case(Shape(2, 4, 100, 150, 32), torch.bfloat16)
    expected = case.triton()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        case.triton()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = case.triton()
    graph.replay()
    torch.cuda.synchronize()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@needs_cuda
@pytest.mark.slow
def test_inductor_at_two_sizes():
    torch._dynamo.reset()

    def function(q, *others):
        return head_interaction_attention(q * 2, *others, attn_impl='triton').relu()

    compiled = torch.compile(function, fullgraph=True)
    for queries, keys in ((100, 63), (131, 70)):
        case = Case(Shape(2, 4, queries, keys, 32), torch.float32)
        expected, found = case.run(function), case.run(compiled)
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name])


@needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_on_a_device_that_is_not_the_current_one():
    case = Case(Shape(2, 4, 20, 30, 32), torch.float32)
    expected = case.triton()
    for name in ('q', 'k', 'v', 'weight', 'bias', 'grad'):
        setattr(case, name, getattr(case, name).to('cuda:1'))
    for name, tensor in case.triton().items():
        assert tensor.device.index == 1
        torch.testing.assert_close(tensor.cpu(), expected[name].cpu())


# ---------------------------------------------------------------------------------
# Ahead of time, without a GPU
# ---------------------------------------------------------------------------------

# of a block that asks for no more than a kernel launch grants by itself, in bytes
SHARED_MEMORY = 48 * 1024
ROW_KERNELS = (kernels.forward_kernel, kernels.backward_kernel)
COPY_KERNELS = (
    kernels.pack_kernel,
    kernels.grad_kernel,
    kernels.gain_kernel,
    kernels.out_kernel,
    kernels.unpack_kernel,
)
# pointers to float32, and to the type of the inputs
FLOAT32 = 'weight mix statistics gain grad_dot_out grad_weight sums'.split()
OF_INPUTS = (
    'scores grads q k v q_packed k_packed v_packed grad out grad_packed product '
    'q_sums k_sums v_sums grad_q grad_k grad_v'
).split()
TYPE_NAMES = {'float32': 'fp32', 'float16': 'fp16', 'bfloat16': 'bf16'}
SAMPLE = [('float32', 2, 80), ('bfloat16', 2, 90), ('float16', 4, 86)]
CAPABILITIES = (80, 86, 89, 90)
# With 8 heads the backward kernel takes all of a thread's 255 registers, on every GPU;
# with others 168 at most, so that each number of heads is compiled for one type and GPU
# in turn.
CONFIGS = [
    (dtype, heads, CAPABILITIES[heads % 4])
    for dtype, several in zip(TYPE_NAMES, ((1, 3, 5), (2, 6), (1, 4, 7)))
    for heads in several
] + [
    ('float32', 8, 80),
    ('float32', 8, 90),
    ('float16', 8, 86),
    ('bfloat16', 8, 80),
    ('bfloat16', 8, 89),
]


def compile_for(kernel, dtype, heads, capability):
    """The kernel as a launch on aligned tiles would compile it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    size = getattr(torch, dtype).itemsize
    constants, warps = dict(HEADS=heads), 4
    if kernel in ROW_KERNELS:
        warps = kernels.ROWS
        constants.update(ROWS=kernels.ROWS, LANE=kernels.choose_lane(heads, size))
    elif kernel is kernels.gain_kernel:
        warps = 16
        constants.update(BLOCK=4096)
    else:
        constants.update(ROWS=32, COLUMNS=128, DIM=96)
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = 'constexpr'
            continue
        if name in FLOAT32:
            signature[name] = '*fp32'
        elif name in OF_INPUTS:
            signature[name] = '*' + TYPE_NAMES[dtype]
        else:
            signature[name] = 'fp32' if name == 'eps' else 'i32'
        if '*' in signature[name] or name == 'row_stride':
            attributes[(index,)] = [['tt.divisibility', 16]]
    source = ASTSource(
        fn=kernel, signature=signature, constexprs=constants, attrs=attributes
    )
    return triton.compile(
        source,
        target=GPUTarget('cuda', capability, 32),
        options=dict(num_warps=warps, ptx_options=kernels.PTX_OPTIONS),
    )


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack, shared and local memory of a kernel."""
    tool = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [tool, '--dump-resource-usage', file.name],
            capture_output=True,
            text=True,
            check=True,
        )
    usage = re.findall(r'(REG|STACK|SHARED|LOCAL):(\d+)', done.stdout)
    assert len(usage) == 4, done.stdout
    return {name: int(number) for name, number in usage}


@compiles
@pytest.mark.parametrize(
    'config',
    [
        *SAMPLE,
        *(pytest.param(c, marks=pytest.mark.slow) for c in CONFIGS if c not in SAMPLE),
    ],
    ids=str,
)
def test_fits_the_registers(config, tmp_path, monkeypatch):
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    for kernel in ROW_KERNELS:
        compiled = compile_for(kernel, *config)
        usage = resource_usage(compiled.asm['cubin'])
        assert usage['STACK'] == usage['LOCAL'] == 0, f'registers spill: {usage}'
        assert usage['SHARED'] <= SHARED_MEMORY
        assert compiled.metadata.shared <= SHARED_MEMORY
        # loads of scores are as wide as a thread's neighbours
        size = getattr(torch, config[0]).itemsize
        words = kernels.choose_lane(config[1], size) * size // 4
        assert f'ld.global.v{words}.b32' in compiled.asm['ptx']


@compiles
@pytest.mark.slow
@pytest.mark.parametrize('kernel', COPY_KERNELS, ids=lambda x: x.fn.__name__)
def test_copies_fit_the_registers(kernel, tmp_path, monkeypatch):
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    for config in SAMPLE:
        usage = resource_usage(compile_for(kernel, *config).asm['cubin'])
        assert usage['STACK'] == usage['LOCAL'] == 0, f'registers spill: {usage}'
        assert usage['SHARED'] <= SHARED_MEMORY


@compiles
@pytest.mark.slow
def test_launches_are_the_same_without_a_search(repo, tmp_path):
    """A plan launches what Triton finds for the arguments, whatever their layout."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name('triton_launches.py'))],
        env={
            **os.environ,
            'PYTHONPATH': str(repo),
            'TRITON_CACHE_DIR': str(tmp_path),
            'TRITON_INTERPRET': '0',
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    assert 'launches are the same' in done.stdout
