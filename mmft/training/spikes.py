"""Minibatches that would throw the weights about: found by the length of their gradient, and skipped on request.

Which number is robust? PPO's policy loss is signed and hovers around zero (whitened advantages sum to zero, the ratio
begins at one), so its ratio to its own median says nothing. The length of the whole gradient before clipping is
positive, grows a hundredfold when any term of the loss does, sees what blows up in the backward pass alone, and is
known before the step, the same on every process. Its running median does not move with a single spike, as a mean would.
Clipping already bounds a spike's length, not its direction: that is what skipping is for.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

WINDOW = 64  # minibatches that the median is taken over
FIRST = 8  # of them before anything is judged
FLAGGED = 10.0  # times the median that is told where no limit is set


class Spikes:
    """The running median of a run's gradient lengths.

    A spike enters the history, too: a median forgives one, and when gradients stay large for good (another learning
    rate, another reward), learning goes on after half a window instead of never.

    Args:
        limit: so many times the median is a spike, which is not learned from; None = spikes are told and learned from.
    """

    def __init__(self, limit: float | None = None):
        self.skips, self.limit = limit is not None, limit or FLAGGED
        self._norms: deque[float] = deque(maxlen=WINDOW)

    def ratio(self, norm: float) -> float | None:
        """The gradient's length over its running median, and one more number of the history; None = too early."""
        usual = median(self._norms) if len(self._norms) >= FIRST else 0.0
        if math.isfinite(norm) and norm > 0:  # a step that taught nothing says nothing of the usual length
            self._norms.append(norm)
        return norm / usual if usual else None

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for the checkpoint; floats survive JSON bit by bit."""
        return {"norms": list(self._norms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._norms = deque(state["norms"], maxlen=WINDOW)
