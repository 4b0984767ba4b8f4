"""Tests of imgloop."""
