"""lecturekit: the reference implementations, the checking engine and the tools behind the course's labs."""

__version__ = "0.1.0"
