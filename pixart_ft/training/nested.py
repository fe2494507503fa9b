"""Trees of tensors and plain values, such as an optimizer's state, in one safetensors file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor


def save_nested(path: Path, tree: Any) -> None:
    """Write dicts, lists and tuples of tensors and plain values, such as an optimizer's state.

    The shape of the tree is kept as JSON in the file's header; keys may be strings or integers.
    """
    tensors: dict[str, Tensor] = {}
    written: set[int] = set()  # storages

    def alone(tensor: Tensor) -> Tensor:
        """On the CPU, with a storage of its own, as the file's writer wants it; copied only where it is not so."""
        found = tensor.detach().cpu().contiguous()
        storage = found.untyped_storage()
        if storage.nbytes() != found.numel() * found.element_size() or storage.data_ptr() in written:
            found = found.clone()
        written.add(found.untyped_storage().data_ptr())
        return found

    def describe(node: Any) -> Any:
        if isinstance(node, Tensor):
            name = f"{len(tensors):06d}"
            tensors[name] = alone(node)
            return {"tensor": name}
        if isinstance(node, dict):
            assert all(type(key) in (str, int) for key in node), "keys must be strings or integers"
            return {"dict": [[key, describe(value)] for key, value in node.items()]}
        if isinstance(node, list | tuple):
            return {type(node).__name__: [describe(value) for value in node]}
        assert node is None or type(node) in (str, int, float, bool), f"cannot save a {type(node).__name__}"
        return node

    tree_json = json.dumps(describe(tree))
    safetensors.torch.save_file(tensors, str(path), metadata={"tree": tree_json})
    tensors.clear()  # `describe` refers to itself, and so keeps them until the garbage is collected


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """Every tensor in a tree of dicts, lists and tuples."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for node in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors_of(node)


def load_nested(path: Path) -> Any:
    """Read what `save_nested` wrote; tensors come on the CPU, bit for bit."""
    with safetensors.safe_open(str(path), framework="pt") as file:

        def build(node: Any) -> Any:
            if not isinstance(node, dict):
                return node
            (kind, content), *_ = node.items()
            if kind == "tensor":
                return file.get_tensor(content)
            if kind == "dict":
                return {key: build(value) for key, value in content}
            items = [build(value) for value in content]
            return tuple(items) if kind == "tuple" else items

        return build(json.loads(file.metadata()["tree"]))
