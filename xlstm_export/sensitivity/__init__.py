"""Which weights of a model, and which activations, can be integers; see `study.py`."""

from .report import Sensitivity as Sensitivity
from .study import sensitivity as sensitivity
