"""`nn.Module` -> numbers with units. Knows nothing of architectures or studies: any timm model can be scored."""
