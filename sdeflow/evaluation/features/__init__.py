"""Feature networks of the evaluation."""
