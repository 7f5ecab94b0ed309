"""How to choose the numbers: permutation and outliers, scales, rounding."""
