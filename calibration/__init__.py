"""Calibration sets, observers and methods; imported as `xlstm_export.calibration`.

Empty so far: FP32 export needs no calibration. The package exists so that its import path is settled.
"""
