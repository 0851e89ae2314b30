"""The two recurrence operators: PyTorch reference and ONNX function bodies."""
