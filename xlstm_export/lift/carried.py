"""What stands for a state between calls of a replaced cell."""

from __future__ import annotations

from ..errors import BuildError
from ..load.signature import UserValue


class Carried:
    """What a replaced cell returns as its state: the graph carries it, and there are no values to use.

    Attributes:
        path, call: of the cell, and the number of the call in the forward pass.
    """

    def __init__(self, path: str, call: int) -> None:
        self.path, self.call = path, call

    def detach(self) -> Carried:
        return self

    clone = contiguous = detach_ = detach

    def to(self, *args: UserValue, **kwargs: UserValue) -> Carried:
        return self

    def __deepcopy__(self, memo: UserValue) -> Carried:
        return self

    def __repr__(self) -> str:
        return "the state that the graph carries"

    def _refuse(self, *args: UserValue) -> UserValue:
        raise BuildError(
            f"forward computes with the state that {self.path} returned, but the exported graph carries it",
            "hand it to the next call as it is; a session resets the streams that begin again: "
            "session.reset(rows)",
        )

    __mul__ = __rmul__ = __add__ = __radd__ = __sub__ = __truediv__ = __getitem__ = __iter__ = __len__ = (
        _refuse
    )

    @classmethod
    def __torch_function__(
        cls, function: UserValue, types: UserValue, args: UserValue, *rest: UserValue
    ) -> UserValue:
        return next(x for x in args if isinstance(x, Carried))._refuse()

    def __getattr__(self, name: str) -> UserValue:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._refuse()
