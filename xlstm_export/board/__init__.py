"""What runs on the target: a bundle is checked, built, verified, timed and used there.

Standard library and NumPy, besides the runtime itself (TensorRT or ONNX Runtime), which is imported where
it is used. `bundle.py` packs this folder and the few modules it stands on into the bundle's `deploy.py`.
"""
