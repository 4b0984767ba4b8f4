"""Tests of what people do with images: names, the gate, chains."""
