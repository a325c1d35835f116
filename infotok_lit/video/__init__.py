"""The adaptive discrete video tokenizer of the second InfoTok paper (arXiv 2512.16975).

A clip is encoded to a grid of discrete tokens; a router measures how hard the clip is, and keeps as many tokens as it
deserves, where its reconstruction is hardest. The names of the parts follow the paper.
"""

FAMILY = "videotok"
"""What exported folders and checkpoints call this model."""
