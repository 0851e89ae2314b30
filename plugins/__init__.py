"""Native implementations of the two recurrence operators; imported as `xlstm_export.plugins`.

Exported graphs carry function bodies of standard operators and run without anything from here.
"""
