"""Tests of the formats, one folder a room."""
