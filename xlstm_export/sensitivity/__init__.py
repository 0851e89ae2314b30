"""Which weights of a model, and which activations, can be integers; see `study.py`."""

from .result import Sensitivity as Sensitivity
from .settings import Search as Search
from .study import sensitivity as sensitivity
