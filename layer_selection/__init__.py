"""Which layers of a hybrid keep full attention."""

import pipeline  # noqa: F401  (first: see there)
