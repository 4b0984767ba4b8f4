"""Tests of what people do with images."""
