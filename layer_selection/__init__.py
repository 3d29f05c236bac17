"""Which layers of a hybrid keep full attention."""
