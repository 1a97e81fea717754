"""1.1-1.2 of the lecture: supervised fine-tuning, RLHF and DPO."""
