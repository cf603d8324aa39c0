"""The package's logger."""

import logging

logger = logging.getLogger("tensorrt_llm double")
