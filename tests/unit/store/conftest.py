"""The store's tests share `whole.py` and `dense.py`."""

import sys
from pathlib import Path

# pytest's importlib mode adds no folder by itself.
sys.path.insert(0, str(Path(__file__).parent))
