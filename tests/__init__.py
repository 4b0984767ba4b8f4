"""Tests of imgloop, most of them against what qemu-img said or says."""
