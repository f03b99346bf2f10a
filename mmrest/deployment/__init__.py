"""Export of models to ONNX Runtime, OpenVINO and PyTorch's export.

=======================  ====================================================
``export.py``            export a model to a file
``verification.py``      compare the file with the model
``quantization.py``      quantise the layers of a file to 8 bits
``detectors.py``         MMDetection's detectors as exportable modules
``segmentors.py``        MMSegmentation's segmentors, likewise
``classifiers.py``       MMPretrain's classifiers, likewise
``preprocessing.py``     preprocessing within the exported program
``operators.py``         operators of detectors, for :func:`torch.export.export`
``onnx_operators.py``    the operators in ONNX
=======================  ====================================================

The modules need MMDetection, ONNX and so on, so ``import mmrest`` does not import
them. The extra ``deploy`` installs what they need.
"""
