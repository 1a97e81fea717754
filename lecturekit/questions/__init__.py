"""What is graded: one module a lab, each with cases, oracle, laws and misconceptions."""
