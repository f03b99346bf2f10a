"""Models that leave Python: files for ONNX Runtime, OpenVINO and PyTorch's export.

=======================  ====================================================
``export.py``            a model becomes a file
``verification.py``      the file against the model
``quantization.py``      a file with layers of 8 bits
``detectors.py``         MMDetection's detectors as modules that can be captured
``preprocessing.py``     pixels, within the exported program
``operators.py``         operators of detectors, for :func:`torch.export.export`
``onnx_operators.py``    what operators are in ONNX
=======================  ====================================================

The modules need MMDetection, ONNX and the like, so ``import mmrest`` does not import
them; they come with the extra ``deploy``.
"""
