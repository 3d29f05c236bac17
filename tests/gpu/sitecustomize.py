"""Python runs this at the start of a process that has this folder on its PYTHONPATH."""

from one_config import take_one_config

take_one_config()
