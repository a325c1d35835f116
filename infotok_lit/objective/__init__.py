"""The InfoTok objective (arXiv 2602.01554, section 3.2): heads, estimators and weights. Knows torch and nothing else.

`config.ObjectiveConfig` says what is on, `infotok.InfoTok` computes it, `report` says what to make of it. Each term is
a file: `compactness`, `sufficiency`, `alignment`, and all three by another estimator in `hsic`.
"""
