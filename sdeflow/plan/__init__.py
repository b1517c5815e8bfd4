"""Plans: what they are made of, how a step becomes one, and what can be asked of it."""
