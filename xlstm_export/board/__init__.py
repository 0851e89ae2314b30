"""Code that runs on the target: it checks, builds, verifies, times and runs a bundle there.

It needs the standard library, NumPy and the runtime (TensorRT or ONNX Runtime), which is imported where it is
used. The bundle's `deploy.py` contains this folder and the few modules it imports.
"""
