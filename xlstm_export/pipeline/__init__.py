"""The whole flow as a file: `schema.py` reads and checks it, `table.py` is the table of stages, `runner.py`
runs it; `deploy.py` is the default pipeline.

    model: {checkpoint: path/to/checkpoint}       # or {module: package.module:factory, weights: file}
    out: out/model
    data: heldout.txt                             # for the task metric and the recorded streams
    stages:
      export: {}
      calibrate: {data: train.txt}
      quantize: {precision: int8}                 # or {}, behind `sensitivity: {data: train.txt}`
      verify: {horizon: 4000}
      bench: {}
      bundle: {target: orin-nano-8gb}
      report: {}
"""
