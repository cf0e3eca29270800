"""Tests of weights' formats."""
