"""How many tokens a sample deserves, and which: shared by video tokens and image tokens."""
