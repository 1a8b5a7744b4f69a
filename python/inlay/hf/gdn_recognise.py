"""Finds out by structure and by experiment whether a module is a Gated DeltaNet layer that Inlay's ops compute.

A module with the parts of one is not taken for one yet: a small stand-in with the module's attributes, but small random
weights, runs its class's own ``forward`` on the CPU in float32, and :func:`inlay.hf.gdn_layer.run`, with padding and
through a cache that is filled, continued and decoded with. Results and states must be the same. So a subclass that
computes something else, or a release that changes the layer, is left alone. The real weights are never read.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from inlay.hf.recognise import NormSpec
from inlay.hf.recognise import recognise as recognise_norm
from inlay.hf.rewrite import with_eager_functions
from inlay.hf.stand_in import uninitialised

_PARTS = {"conv1d", "norm", "out_proj"}
_SEPARATE = {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"}  # Qwen3.5
_GROUPED = {"in_proj_qkvz", "in_proj_ba"}  # Qwen3-Next
_SIZES = ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim", "key_dim", "value_dim", "layer_idx")
_ARGUMENTS = ["self", "hidden_states", "cache_params", "attention_mask", "kwargs"]
_ACTIVATIONS = ("silu", "swish")
_MAX_HEAD_DIM, _HEAD_DIM_MULTIPLE = 256, 8  # of the gated delta rule
_WIDTHS = range(2, 9)  # of the convolution


@dataclass(frozen=True, eq=False)
class GdnSpec:
    """What a Gated DeltaNet layer's forward needs to know beyond the layer's attributes.

    Attributes:
        grouped: q, k, v and z come from one projection, grouped by key head (Qwen3-Next), not from one and one more.
        norm: what the layer's gated norm computes; None if that is not known.
    """

    grouped: bool
    norm: NormSpec | None = None

    def __deepcopy__(self, memo: dict) -> GdnSpec:
        return self


_known: dict[tuple, GdnSpec | str] = {}


def recognise(module: Any) -> GdnSpec | str | None:
    """The layer's spec; or why it has none although it looks like a layer; or None if it does not look like one."""
    children = set(module._modules)
    has_parts = children in (_PARTS | _SEPARATE, _PARTS | _GROUPED)
    if not has_parts:
        looks_like_one = "GatedDeltaNet" in type(module).__name__ and children
        return f"its parts are {', '.join(sorted(children))}" if looks_like_one else None
    grouped = children >= _GROUPED
    reason = _structural_reason(module, grouped)
    if reason is not None:
        return reason
    spec = _computed(module, grouped)
    norm = recognise_norm(module.norm)
    return replace(spec, norm=norm) if isinstance(spec, GdnSpec) and isinstance(norm, NormSpec) else spec


def _computed(module: Any, grouped: bool) -> GdnSpec | str:
    """What the experiment says about modules like this one; it is made once."""
    key = _key(module)
    try:
        spec = _known.get(key)
    except TypeError:  # an attribute that cannot be hashed: nothing to remember it by
        return _by_experiment(module, grouped)
    if spec is None:
        spec = _known[key] = _by_experiment(module, grouped)
    return spec


def _structural_reason(module: Any, grouped: bool) -> str | None:
    missing = [name for name in (*_SIZES, "activation") if not hasattr(module, name)]
    if missing:
        return f"it has no {', '.join(missing)}"
    if set(module._parameters) != {"A_log", "dt_bias"} or module._buffers:
        return f"its tensors are not A_log and dt_bias but {', '.join([*module._parameters, *module._buffers])}"
    if list(inspect.signature(type(module).forward).parameters) != _ARGUMENTS:
        return "its forward takes other arguments than hidden_states, cache_params, attention_mask and keywords"
    if grouped and not hasattr(module, "fix_query_key_value_ordering"):
        return "it has no fix_query_key_value_ordering"
    if module.activation not in _ACTIVATIONS:
        return f"its activation is {module.activation}, not silu"
    key_heads, value_heads = module.num_k_heads, module.num_v_heads
    if key_heads < 1 or value_heads % key_heads:
        return f"its {value_heads} value heads are not a multiple of its {key_heads} key heads"
    for width in (module.head_k_dim, module.head_v_dim):
        if width > _MAX_HEAD_DIM or width % _HEAD_DIM_MULTIPLE:
            return f"its heads are {width} wide, not a multiple of {_HEAD_DIM_MULTIPLE} up to {_MAX_HEAD_DIM}"
    return _convolution_reason(module.conv1d, 2 * module.key_dim + module.value_dim)


def _convolution_reason(conv: Any, channels: int) -> str | None:
    if not isinstance(conv, nn.Conv1d):
        return f"its conv1d is a {type(conv).__name__}"
    width = conv.kernel_size[0]
    if width not in _WIDTHS:
        return f"its convolution is {width} wide, not {_WIDTHS[0]} to {_WIDTHS[-1]}"
    if (conv.groups, conv.in_channels, conv.out_channels) != (channels, channels, channels):
        return "its convolution is not depthwise over q, k and v"
    return None


def _key(module: Any) -> tuple:
    """Everything that may change what ``forward`` computes, except for sizes and weights."""
    ignored = (*_SIZES, "training", "forward", "hidden_size", "conv_dim")
    own = sorted((name, value) for name, value in vars(module).items() if not name.startswith("_"))
    attributes = tuple(item for item in own if item[0] not in ignored)
    ratio = module.num_v_heads // module.num_k_heads
    conv = module.conv1d
    return type(module), type(module).forward, attributes, ratio, conv.kernel_size, conv.bias is None, *module._modules


def _by_experiment(module: Any, grouped: bool) -> GdnSpec | str:
    from inlay.hf import gdn_layer  # which needs GdnSpec

    forward = with_eager_functions(type(module).forward)
    if not callable(forward):
        return forward
    spec = GdnSpec(grouped)
    twin = _twin(module, grouped)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            for (x, theirs, mask), (_, ours, _) in zip(_calls(twin), _calls(twin), strict=True):
                expected = forward(twin, x, cache_params=theirs, attention_mask=mask)
                actual = gdn_layer.run(twin, spec, x, ours, mask, gdn_layer.Packing(None, None))
                states = [] if ours is None else zip(_states(ours), _states(theirs), strict=True)
                if not all(_agree(*pair) for pair in [(actual, expected), *states]):
                    return "it computes something else than Inlay's Gated DeltaNet layer"
        except Exception as error:  # whatever an unknown class raises, it is not a layer we know
            return f"its forward could not be tried out: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return spec


class _Gate(nn.Module):
    """Stands in for the gated norm, which is called as a module and recognised by itself."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return x * gate.sigmoid()


def _twin(module: Any, grouped: bool) -> Any:
    """A small stand-in for a layer: its plain attributes, no tensors, hooks or patches of it, few small heads."""
    cls: Any = type(module)
    twin = uninitialised(cls)
    nn.Module.__init__(twin)
    ignored = {"forward", "training", *vars(twin)}
    vars(twin).update({name: value for name, value in vars(module).items() if name not in ignored})
    ratio, hidden, k, v = module.num_v_heads // module.num_k_heads, 8, 8, 16
    keys, values = 2 * k, 2 * ratio * v
    channels = 2 * keys + values
    vars(twin).update(
        num_k_heads=2, num_v_heads=2 * ratio, head_k_dim=k, head_v_dim=v, key_dim=keys, value_dim=values,
        conv_dim=channels, hidden_size=hidden, layer_idx=0,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> nn.Parameter:
        values = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        return nn.Parameter(values, requires_grad=False)

    def linear(rows: int, columns: int) -> nn.Linear:
        module = nn.Linear(columns, rows, bias=False, device="meta")  # which draws no random numbers
        module.weight = nn.Parameter(random(rows, columns) * columns**-0.5, requires_grad=False)
        return module

    width, bias = module.conv1d.kernel_size[0], module.conv1d.bias is not None
    twin.conv1d = nn.Conv1d(channels, channels, width, groups=channels, padding=width - 1, bias=bias, device="meta")
    twin.conv1d.weight = random(channels, 1, width)
    if bias:
        twin.conv1d.bias = random(channels)
    rows = {"in_proj_qkv": channels, "in_proj_z": values, "in_proj_b": 2 * ratio, "in_proj_a": 2 * ratio}
    if grouped:
        rows = {"in_proj_qkvz": channels + values, "in_proj_ba": 4 * ratio}
    for name, size in rows.items():
        setattr(twin, name, linear(size, hidden))
    twin.norm, twin.out_proj = _Gate(), linear(hidden, values)
    twin.A_log, twin.dt_bias = random(2 * ratio), random(2 * ratio)
    return twin.eval()


def _calls(twin: Any) -> Iterator[tuple[Tensor, Any, Tensor | None]]:
    """Inputs, caches and masks: a padded batch, then tokens that fill a cache and go on with it."""
    from transformers.cache_utils import Cache, LinearAttentionLayer

    generator = torch.Generator().manual_seed(1)

    def tokens(count: int) -> Tensor:
        return torch.randn((2, count, twin.hidden_size), generator=generator, dtype=torch.float32, device="cpu")

    mask = torch.ones(2, 70, dtype=torch.bool, device="cpu")
    mask[0, :9] = mask[1, -7:] = False
    yield tokens(70), None, mask
    cache = Cache(layers=[LinearAttentionLayer()])
    for count in (3, 1, 5, 66):
        yield tokens(count), cache, None


def _states(cache: Any) -> tuple[Tensor, Tensor]:
    return cache.layers[0].conv_states[0], cache.layers[0].recurrent_states[0]


def _agree(actual: Tensor, expected: Tensor) -> bool:
    if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        return False
    return bool((actual - expected).abs().max() <= 1e-4 * expected.abs().max())
