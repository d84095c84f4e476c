"""Kinds and models that are not of the package join the registry tests: MICROGEN_PLUGS=my_kind,my_model pytest tests/test_kinds.py"""

import importlib
import os

for module in filter(None, os.environ.get("MICROGEN_PLUGS", "").split(",")):
    importlib.import_module(module.strip())
