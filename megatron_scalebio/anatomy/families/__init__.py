"""The model families, one file each: what declares a FAMILY here is one that `model.family` may name."""

import importlib
import pkgutil

from megatron_scalebio.anatomy.family import Family


def _declared() -> dict[str, Family]:
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    return {module.FAMILY.name: module.FAMILY for module in modules}


FAMILIES = _declared()
