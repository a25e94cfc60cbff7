"""Scores an `nn.Module` with numbers and units.

This package knows neither architectures nor studies, so it can score any timm model.
"""
