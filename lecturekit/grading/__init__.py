"""For instructors: releasing labs, staging and grading submissions."""
