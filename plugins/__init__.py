"""Native implementations of the two recurrence operators; imported as `xlstm_export.plugins`.

Empty so far: exported graphs carry function bodies of standard operators. The package exists so that its
import path is settled.
"""
