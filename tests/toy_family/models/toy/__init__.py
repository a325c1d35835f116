"""Toy: the smallest family that the frame can train, and the example of docs/new_family.md."""
