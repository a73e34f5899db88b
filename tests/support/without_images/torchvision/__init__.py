"""In place of torchvision, whose builds on PyPI do not fit the CPU build of torch.

vLLM and transformers import it beside their multimodal models, to process images. A folder with this package on the
path lets a server run such a model for text; an image would fail.
"""

import importlib.abc
import importlib.machinery
import sys
import types

__version__ = "0.28.0"


class _Name(type):
    """A class of which every attribute is its own name, as for a member of an enumeration."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Module(types.ModuleType):
    """A module that has every class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes each module below this package."""

    def find_spec(self, name: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        found = name.startswith(f"{__name__}.")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if found else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Do nothing: the module has every class already."""


sys.meta_path.insert(0, _Finder())
