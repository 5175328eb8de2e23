"""Makes `import torchvision` work beside a torch that its compiled half was not built for.

The processors of Qwen-VL and SmolVLM need torchvision's Python half alone: resizing, normalising, sampling frames.
Beside a CPU build of torch, a CUDA build of its compiled half does not load, and then the import dies with
`operator torchvision::nms does not exist`, because `_meta_registrations.py` attaches fake kernels to operators that
nobody defined. transformers finds torchvision installed, imports it, and dies with it. So the operators are defined
as names, with nothing behind them, just before torchvision is first imported. Where the compiled half loads, nothing
is changed.

`install()` serves this process. Run as a script it serves the whole virtual environment, so that what tests and
`make` launch in processes of their own works as well; it does nothing there if torchvision works already.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

_libraries: list[object] = []  # torch forgets the operators of a library that is collected


def _define_operators(package: Path) -> None:
    import torch

    try:
        for compiled in package.glob("_C*"):
            torch.ops.load_library(compiled)
            return
    except OSError:
        pass
    source = (package / "_meta_registrations.py").read_text(encoding="utf-8")
    names = re.findall(r'(?:register_meta\("|register_fake\("torchvision::)(\w+)"\)', source)
    library = torch.library.Library("torchvision", "FRAGMENT")
    _libraries.append(library)
    for name in names:
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor input) -> Tensor")


class TorchvisionFinder:
    """Finds torchvision as usual, and puts `_define_operators` before the first line of it."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == "torchvision" else None
        if spec is None or spec.loader is None or spec.origin is None:
            return None
        package, run = Path(spec.origin).parent, spec.loader.exec_module

        def define_and_run(module) -> None:
            _define_operators(package)
            run(module)

        spec.loader.exec_module = define_and_run
        return spec


def install() -> None:
    """Serve this process; harmless twice. Call it before torchvision, and so before transformers, is imported."""
    if not any(getattr(finder, "__name__", "") == TorchvisionFinder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, TorchvisionFinder)


def install_in_environment() -> bool:
    """Serve every process of this virtual environment, if torchvision fails in it. Returns whether it did."""
    plain = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True)
    if plain.returncode == 0 or sys.prefix == sys.base_prefix:
        return False
    site = Path(sysconfig.get_path("purelib"))
    shutil.copy(__file__, site / "torchvision_shim.py")
    (site / "torchvision_shim.pth").write_text("import torchvision_shim; torchvision_shim.install()\n")
    return True


if __name__ == "__main__":
    if install_in_environment():
        print("torchvision: its compiled half does not fit this torch; the Python half serves")
