"""1.3 of the lecture: QLoRA's NF4 and BitDelta."""
