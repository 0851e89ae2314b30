"""Where a candidate leaves its reference: the first block, then the first tensor, and what is wrong with it.

`search.py` says in which order what is compared with what, `replay.py` runs both sides from the same inputs
and states, `why.py` compares what a node reads.
"""
