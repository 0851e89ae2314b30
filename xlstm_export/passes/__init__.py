"""Small graph passes over `onnx_ir.Model`, one file each; a file's docstring lists the cases it handles."""
