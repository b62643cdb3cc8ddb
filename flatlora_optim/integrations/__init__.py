"""Helpers for single frameworks. Each module imports its framework; the core imports none.

================  =====================================================
``transformers``  Hugging Face ``Trainer`` and those built on it (TRL)
================  =====================================================
"""
