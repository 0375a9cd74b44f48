"""Import one module right after another has been imported, whenever that happens."""

import importlib
import importlib.abc
import sys
import warnings


def after(module: str, then: str) -> None:
    """Import `then` now if `module` is already imported, else as soon as it has been.

    If `then` cannot be imported a warning says why: `module` is not to suffer from it.
    """
    if module in sys.modules and not _initializing(sys.modules[module]):
        _import(then, module)
    elif not any(isinstance(f, _Finder) and f.names == (module, then) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder(module, then))


def _import(then: str, module: str) -> None:
    try:
        importlib.import_module(then)
    except Exception as error:
        warnings.warn(f"{then} does not work with {module}: {error}", RuntimeWarning, stacklevel=2)


def _initializing(module) -> bool:
    return getattr(getattr(module, "__spec__", None), "_initializing", False)


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the other finders find `module` and wraps its loader; leaves once it is loaded."""

    def __init__(self, module: str, then: str):
        self.names = (module, then)

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.names[0]:
            return None
        for finder in sys.meta_path:
            if isinstance(finder, _Finder) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    def __init__(self, loader, finder: _Finder):
        self.loader, self.finder = loader, finder

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        _import(self.finder.names[1], module.__name__)
