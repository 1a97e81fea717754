"""2 of the lecture: multi-modal LLMs."""
