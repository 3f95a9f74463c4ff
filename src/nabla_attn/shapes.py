"""Shapes in annotations: jaxtyping's where it is installed, plain tensors elsewhere.

The test run installs jaxtyping and checks every annotated call; using the package needs only torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
else:
    try:
        from jaxtyping import Bool, Float, Int
    except ImportError:
        from torch import Tensor

        class _Shaped:
            def __class_getitem__(cls, item: Any) -> Any:
                return Tensor

        Bool = Float = Int = _Shaped

__all__ = ["Bool", "Float", "Int"]
