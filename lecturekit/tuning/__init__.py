"""1.3 of the lecture: parameter-efficient fine-tuning."""
