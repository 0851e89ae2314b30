"""Tracing: from a lifted module to an ONNX graph with its weights beside it."""
