"""The real CT data of ../shared/data, which are not ours to commit."""

from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_real_data = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is absent: it is not ours to commit")
