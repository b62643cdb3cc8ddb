"""Helpers for trainers. Each module imports its trainer; the core imports none.

================  ==================================================================================
``transformers``  Hugging Face ``Trainer`` and those built on it: TRL, LLaMA-Factory,
                  sentence-transformers, SetFit
``axolotl``       a plug-in for its YAML
``swift``         a callback for ms-swift's command line
``torchtune``     a recipe
``lightning``     a callback
``composer``      a callback
``options``       what they share
================  ==================================================================================
"""
