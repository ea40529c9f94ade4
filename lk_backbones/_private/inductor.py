"""Parts of PyTorch's compiler, which takes seconds to import: only who compiles imports this.

Documented, for all their underscore: PyTorch's tutorials on AOTInductor call them.
"""

from __future__ import annotations

from lk_backbones._private.borrow import borrow

__all__ = ["aoti_compile_and_package", "aoti_load_package"]

aoti_compile_and_package = borrow("torch", "torch._inductor", "aoti_compile_and_package")
aoti_load_package = borrow("torch", "torch._inductor", "aoti_load_package")
