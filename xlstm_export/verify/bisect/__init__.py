"""Find where a candidate differs from its reference: the first block, the first tensor in it, and why.

`search.py` defines what is compared, and in which order; `replay.py` runs both sides from the same inputs
and states, `why.py` compares what a node reads.
"""
