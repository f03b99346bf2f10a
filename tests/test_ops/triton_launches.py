"""What the Triton operator launches, recorded by a driver without a GPU.

Triton compiles the kernels for a GPU that is not there, and a launch is written down
instead of made. A driver cannot be taken back, so test_triton.py runs this file as a
process of its own.
"""

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from mmrest.ops import triton_head_interaction as kernels

launches = []
searches = []


class Launcher:
    def __init__(self, source, metadata):
        pass

    def __call__(self, x, y, z, stream, function, *rest):
        # metadata of the kernel and of the launch, two hooks, then the arguments
        args = [
            (arg.dtype, arg.shape, arg.stride()) if torch.is_tensor(arg) else arg
            for arg in rest[4:]
        ]
        launches.append(((x, y, z), function, args))


class Utils:
    functions: dict = {}

    def load_binary(self, name, binary, *_):
        function = self.functions.setdefault(binary, f'{name} {len(self.functions)}')
        return None, function, 32, 0, 1024

    def get_device_properties(self, device):
        return {'max_shared_mem': 101376}


class Driver:
    launcher_cls, utils = Launcher, Utils()

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget('cuda', 80, 32)


def record(
    dtype,
    layout,
    grad_layout,
    weight_offset=0,
    queries=40,
    tile_rows=None,
    eps=1e-5,
    saved=None,
):
    """The launches of a forward and a backward pass.

    ``saved`` is what a hook makes of tensors that are saved for the backward pass.
    """
    launches.clear()

    def draw(tokens):
        return torch.randn(1, tokens, 2, 32, dtype=dtype).transpose(1, 2)

    q, k, v, grad = (draw(n) for n in (queries, 20, 20, queries))
    weight = torch.randn(8)[weight_offset:][:4].view(2, 2)
    leaves = [layout(x).requires_grad_() for x in (q, k, v)] + [weight.requires_grad_()]
    with torch.autograd.graph.saved_tensors_hooks(plain, saved or plain):
        out = kernels.triton_head_interaction_attention(
            *leaves, 0.5, eps, None, tile_rows
        )
    torch.autograd.grad(out, leaves, grad_layout(grad))
    return list(launches)


def plain(x):
    return x


def contiguous(x):
    return x.contiguous()


def strided(x):
    return x.repeat_interleave(2, dim=3)[..., ::2]


def misaligned(x):
    flat = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
    return flat.view(x.shape).copy_(x)


def expanded(x):
    return x[:, :, :1, :1].expand(x.shape)


CASES = [
    dict(dtype=torch.float32, layout=plain, grad_layout=plain),
    dict(dtype=torch.bfloat16, layout=plain, grad_layout=plain),
    dict(dtype=torch.bfloat16, layout=contiguous, grad_layout=contiguous),
    dict(dtype=torch.bfloat16, layout=strided, grad_layout=plain),
    dict(dtype=torch.bfloat16, layout=misaligned, grad_layout=plain),
    dict(dtype=torch.bfloat16, layout=plain, grad_layout=misaligned),
    dict(dtype=torch.bfloat16, layout=plain, grad_layout=expanded),
    dict(dtype=torch.float32, layout=plain, grad_layout=plain, weight_offset=1),
    dict(dtype=torch.bfloat16, layout=plain, grad_layout=plain, queries=64),
    dict(dtype=torch.bfloat16, layout=plain, grad_layout=plain, tile_rows=16),
    dict(dtype=torch.float32, layout=plain, grad_layout=plain, eps=1),
    dict(dtype=torch.float32, layout=plain, grad_layout=plain, saved=misaligned),
]


def main():
    driver.set_active(Driver())
    triton.compiler.compiler.max_shared_mem = lambda device: 101376
    search = triton.JITFunction.run

    def counted(self, *args, **kwargs):
        searches.append(self)
        return search(self, *args, **kwargs)

    triton.JITFunction.run = counted
    expected = []
    for case in CASES:
        kernels._PLANS.clear()
        expected.append(record(**case))
    kernels._PLANS.clear()
    for case in CASES:  # plans of one size meet other layouts
        record(**case)
    for case, launched in zip(CASES, expected):
        searches.clear()
        found = record(**case)
        assert found == launched, (case, found, launched)
        whole = 'tile_rows' not in case
        assert len(launched) == (8 if whole else 12), launched
        assert len(searches) == (0 if whole else 12), (case, searches)
    functions = {function for launched in expected for _, function, _ in launched}
    print(f'{len(functions)} kernels, launches are the same')


if __name__ == '__main__':
    main()
