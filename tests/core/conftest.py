"""Put this folder's helper modules on the import path. No torch: most tests here need none."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
