"""Precision of a graph: recipes, half types with FP32 fences, Q/DQ, and the limits of TensorRT."""
