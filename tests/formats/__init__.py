"""Tests of the formats: what the bytes mean."""
