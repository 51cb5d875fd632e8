"""Where the tests find the repository, and data that is not part of it."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
# The benchmarks' data and the tokenizers, where there are any; tests that need them skip without.
SHARED = Path(os.environ.get("SAPT_DATA_DIR") or REPOSITORY.parent / "shared")
