"""Pipelines: `schema.py` reads and checks a pipeline file, `table.py` is the table of stages, `runner.py`
runs them, `deploy.py` is the default pipeline. A pipeline file looks like this:

    model: {checkpoint: path/to/checkpoint}       # or {module: package.module:factory, weights: file}
    out: out/model
    data: heldout.txt                             # for the task metric and the recorded streams
    stages:
      export: {}
      calibrate: {data: train.txt}
      quantize: {precision: int8}                 # or {}, after `sensitivity: {data: train.txt}`
      verify: {horizon: 4000}
      bench: {}
      bundle: {target: orin-nano-8gb}
      report: {}
"""
