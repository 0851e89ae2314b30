"""Ranges of activations for quantization; imported as `xlstm_export.calibration`.

    data = sets.load("calib.txt", io, vocab_size=256)      # sequences, checked against the model
    scales = observers.calibrate(folder, data)             # runs the graph, writes scales.json
    scales.amax("layer_norm")

`sources.py` reads files, `overlap.py` keeps evaluation data out, `observed_graph.py` runs a graph with its
inner values as outputs, `methods.py` makes a range of a histogram, `scales.py` is the result. The folder
`sets/` holds data for the examples.
"""
