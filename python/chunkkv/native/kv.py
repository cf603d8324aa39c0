"""Views of K and V caches for the native ops: two addresses, and the layout that says where each token lies."""

from __future__ import annotations

from dataclasses import dataclass, field

from chunkkv.errors import NativeArgumentError
from chunkkv.native.arrays import ITEM_BYTES, Array, RawArray, as_raw, expect
from chunkkv.native.structs import Layout


@dataclass(frozen=True)
class KVView:
    """The K and V of one layer in the caller's memory; made by contiguous_kv, packed_kv or paged_kv.

    Parameters
    ----------
    key, value : int
        Addresses of K and V; for a paged pool both are the address of the layer.
    layout : structs.Layout
        Where the token of a row and head lies, for K and V alike.
    kv_heads, head_dim : int
        Hkv and D.
    dtype : str
        Type of the elements, a key of arrays.ITEM_BYTES.
    on_device : bool or None
        Whether the memory is on the GPU; None where it is not known.
    arrays : tuple
        The arrays that were passed, so that they live as long as the view.
    """

    key: int
    value: int
    layout: Layout
    kv_heads: int
    head_dim: int
    dtype: str
    on_device: bool | None
    arrays: tuple[Array, ...] = field(repr=False, default=())

    @property
    def geometry(self) -> tuple[int | None, ...]:
        """The layout, heads, head size and bytes of an element: what the layers of one call must have in common."""
        values = tuple(getattr(self.layout, name) for name, _ in Layout._fields_)
        return (*values, self.kv_heads, self.head_dim, ITEM_BYTES[self.dtype])


def contiguous_kv(key: Array, value: Array) -> KVView:
    """Return K and V [B, Hkv, S, D]; any strides that both share, D dense."""
    keys, values = _same_shape(key, value, 4)
    _, kv_heads, tokens, head_dim = keys.shape
    layout = strided_layout(keys, row=0, head=1, token=2, extent=tokens)
    return KVView(keys.pointer, values.pointer, layout, kv_heads, head_dim, keys.dtype, keys.on_device, (key, value))


def packed_kv(key: Array, value: Array, row_starts: Array) -> KVView:
    """Return K and V [T, Hkv, D] (views of packed QKV do) whose rows start at row_starts int32 [B]."""
    keys, values = _same_shape(key, value, 3)
    tokens, kv_heads, head_dim = keys.shape
    layout = strided_layout(keys, row=None, head=1, token=0, extent=tokens)
    layout.row_starts = expect(row_starts, "row_starts", "int32", (None,)).pointer
    arrays = (key, value, row_starts)
    return KVView(keys.pointer, values.pointer, layout, kv_heads, head_dim, keys.dtype, keys.on_device, arrays)


def paged_kv(pool: Array, block_offsets: Array, layer: int) -> KVView:
    """Return one layer of TensorRT-LLM's pool [blocks, layers, 2, Hkv, tokens_per_block, D] (K, then V).

    block_offsets int32 [B, 2, max_blocks] counts K and V blocks of all layers: block * layers * 2, + 1 for V.
    """
    raw = expect(pool, "pool", None, (None, None, 2, None, None, None))
    table = expect(block_offsets, "block_offsets", "int32", (None, 2, None))
    blocks, layers, _, kv_heads, tokens_per_block, head_dim = raw.shape
    if not 0 <= layer < layers:
        raise NativeArgumentError(f"layer is {layer}; the pool holds layers 0 to {layers - 1}")
    row_bytes = head_dim * ITEM_BYTES[raw.dtype]
    layout = Layout(block_offsets=table.pointer, tokens_per_block=tokens_per_block, max_blocks=table.shape[2])
    layout.stride_token, layout.stride_head = row_bytes, tokens_per_block * row_bytes
    layout.stride_block = kv_heads * tokens_per_block * row_bytes
    layout.extent = (blocks - 1) * layers * 2 + 2  # the same for every layer: offsets count from the layer's base
    base = raw.pointer + layer * 2 * layout.stride_block
    return KVView(base, base, layout, kv_heads, head_dim, raw.dtype, raw.on_device, (pool, block_offsets))


def strided_layout(raw: RawArray, *, row: int | None, head: int, token: int, extent: int) -> Layout:
    """Return the layout of an array whose axes `row`, `head`, `token` are given; the last axis must be dense."""
    strides = raw.strides
    assert strides is not None
    if raw.shape[-1] > 1 and strides[-1] != ITEM_BYTES[raw.dtype]:
        raise NativeArgumentError(
            f"the last axis has a stride of {strides[-1]} bytes; the elements of a head must be adjacent "
            f"({ITEM_BYTES[raw.dtype]} bytes)"
        )
    return Layout(
        stride_row=0 if row is None else strides[row],
        stride_head=strides[head],
        stride_token=strides[token],
        extent=extent,
    )


def _same_shape(key: Array, value: Array, axes: int) -> tuple[RawArray, RawArray]:
    keys, values = as_raw(key), as_raw(value)
    if len(keys.shape) != axes or (keys.shape, keys.strides, keys.dtype) != (
        values.shape,
        values.strides,
        values.dtype,
    ):
        raise NativeArgumentError(
            f"key is {keys.dtype} {keys.shape} with strides {keys.strides}, value {values.dtype} {values.shape} with "
            f"{values.strides}; both must be alike and have {axes} axes"
        )
    return keys, values
