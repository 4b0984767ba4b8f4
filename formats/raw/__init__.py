"""The raw format: no structure at all."""
