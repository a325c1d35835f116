"""The InfoTok objective (arXiv 2602.01554, section 3.2): heads, estimators and weights. Knows torch and nothing else.

`config.ObjectiveConfig` says what is on, `infotok.InfoTok` computes it, `report` says what the numbers mean.
"""
