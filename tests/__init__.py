"""The tests of imgloop."""
