"""Measures of features: how alike two sets are (CKA), and how many bits about a known quantity can be read off one."""
