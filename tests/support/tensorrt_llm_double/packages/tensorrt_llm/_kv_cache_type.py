"""The kinds of KV cache; where it can be imported from depends on the generation."""

import enum


class KVCacheType(enum.Enum):
    CONTINUOUS, PAGED, DISABLED = "continuous", "paged", "disabled"
