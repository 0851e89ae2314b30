"""Precision of a graph: recipes, half types with FP32 fences, Q/DQ, and what a CPU makes of them."""
