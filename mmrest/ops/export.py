"""Whether a model is running, or being turned into something else."""

import torch


def is_exporting() -> bool:
    """Whether TorchScript or ONNX export watches: forms without our operator."""
    return (
        torch.jit.is_scripting()
        or torch.jit.is_tracing()
        or torch.onnx.is_in_onnx_export()
    )


def is_captured() -> bool:
    """Whether the code is being recorded, so that it should not depend on sizes."""
    return is_exporting() or torch.compiler.is_compiling()
