"""OpenUni: meta queries and a connector between a vision-language model and a diffusion transformer
(Wu et al. 2025, arXiv 2505.23661)."""
