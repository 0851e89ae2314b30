"""ONNX graphs on disk and in memory: reading, cutting, weights, element types."""
