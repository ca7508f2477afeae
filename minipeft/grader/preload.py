"""What the process imports that others are forked from."""

from minipeft.grader import judge  # noqa: F401
from minipeft.lab import base, tasks  # noqa: F401
