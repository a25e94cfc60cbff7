"""Full training of one network, or of a whole front, to weights that can be deployed."""
