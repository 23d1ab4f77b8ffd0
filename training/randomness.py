"""Seeds that are functions of what they are for.

Nothing in a run draws from one long stream of random numbers, whose state would have to be saved and shared. Every
random thing has a generator of its own, seeded by a hash of what the thing is ("sample", seed, number): so a run that
was stopped, other batch sizes and other numbers of processes see the numbers of the run that was not.
"""

import hashlib
from dataclasses import dataclass
from typing import Any


def digest(*parts: Any) -> bytes:
    """A hash of 16 bytes of `parts`: bytes as they are, anything else by its repr."""
    h = hashlib.blake2b(digest_size=16)
    for p in parts:
        p = p if isinstance(p, bytes) else repr(p).encode()
        h.update(len(p).to_bytes(8, "little") + p)
    return h.digest()


def derive_seed(*parts: Any) -> int:
    """A seed of 63 bits that is a function of `parts`; different parts give independent random streams."""
    return int.from_bytes(digest(*parts)[:8], "little") >> 1


@dataclass(frozen=True)
class SampleRandomness:
    """How the random parts of a sample are distributed. `timesteps` is the length of the model's noise schedule; the
    other fields are the training settings of the same names."""

    timesteps: int = 1000
    timestep_bias: float = 1.0
    even_timesteps: bool = False
    min_timestep: int = 0
    max_timestep: int = 0  # 0: the last timestep of the schedule
    drop_prompt: float = 0.0
    drop_hint: float = 0.0
    noise_offset: float = 0.0

    def timestep(self, u: float) -> int:
        """Map u, uniform in [0,1), to a timestep of the allowed range: low + (high - low) * u^bias, rounded down."""
        low, high = self.min_timestep, self.max_timestep or self.timesteps - 1
        return min(high, low + int((high - low + 1) * u**self.timestep_bias))
