"""Pictures of run folders. Reads numbers only, never imports torch."""
