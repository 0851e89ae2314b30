"""A lifted module becomes an ONNX graph with its weights beside it."""
