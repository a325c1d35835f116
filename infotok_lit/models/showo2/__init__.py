"""Show-o2: native unified multimodal models (Xie et al. 2025, arXiv 2506.15564)."""
