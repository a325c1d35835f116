"""Toy: the smallest base model that can be trained, exported and asked."""
