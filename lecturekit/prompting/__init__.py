"""3 of the lecture: prompting and retrieval."""
