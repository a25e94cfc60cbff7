"""Pictures and pages of run folders. They read numbers only, and never import torch."""
