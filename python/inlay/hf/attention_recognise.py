"""Finds out by structure and by experiment whether a module is an attention layer that Inlay's ops compute.

A module with the parts of one is not taken for one yet: a small stand-in with the module's attributes, but small random
weights, runs its class's own ``forward`` on the CPU, and :func:`inlay.hf.attention_layer.run`. What the class hands to
its attention function (queries and keys as normed and rotated, masks, keywords) is recorded on the way. Results, and
what is recorded, must be the same: in float32 with padding and through a cache, and in every dtype for the rotation,
which rounds at different places. So a subclass that computes something else, or a release that changes the layer, is
left alone. The real weights are never read.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inlay.hf.recognise import NormSpec
from inlay.hf.recognise import recognise as recognise_norm
from inlay.hf.rewrite import with_eager_functions
from inlay.hf.stand_in import uninitialised
from inlay.ops._attention_checks import HEAD_DIM_MULTIPLE, MAX_HEAD_DIM
from inlay.ops.rope import qk_norm_rope

_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_NORMS = {"q_norm", "k_norm"}
_ATTRIBUTES = ("config", "head_dim", "layer_idx", "num_key_value_groups", "scaling", "attention_dropout")
_ARGUMENTS = ["self", "hidden_states", "position_embeddings", "attention_mask", "past_key_values", "kwargs"]
# By the keyword that an attention function takes it as: the layer's attribute.
KEYWORDS = {"softcap": "attn_logit_softcapping", "s_aux": "sinks"}
_IN_THE_MASK = {"sliding_window"}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HEADS, _WIDTH, _HIDDEN = 2, 16, 24  # key heads, their width, and the hidden size of a stand-in


class Rotation(NamedTuple):
    """How a layer rotates queries and keys by angles of one width.

    Attributes:
        pairs: there is an angle for each pair of channels, not for each channel.
        rounding: ``rotary_rounding`` by dtype; a dtype that is missing rounds otherwise.
    """

    pairs: bool
    interleaved: bool
    rounding: dict[torch.dtype, str]


@dataclass(frozen=True, eq=False)
class AttentionSpec:
    """What an attention layer's forward needs to know beyond the layer's attributes.

    Attributes:
        gated: q_proj gives each head a query and a gate, side by side.
        keywords: which of :data:`KEYWORDS` the layer hands to its attention function.
        wide: how it rotates by angles as wide as the heads; None: it does not take such.
        narrow: how it rotates by narrower angles; likewise.
        norms: what q_norm and k_norm compute; None where they are none, or are not known.
    """

    gated: bool
    keywords: frozenset[str]
    wide: Rotation | None = None
    narrow: Rotation | None = None
    norms: tuple[NormSpec, NormSpec] | None = None

    def __deepcopy__(self, memo: dict) -> AttentionSpec:
        return self


_known: dict[tuple, AttentionSpec | str] = {}


def recognise(module: Any) -> AttentionSpec | str | None:
    """The layer's spec; or why it has none although it looks like a layer; or None if it does not look like one."""
    children = set(module._modules)
    if not children >= _PROJECTIONS or children - _PROJECTIONS not in (set(), _NORMS):
        return None
    if not all(hasattr(module, name) for name in _ATTRIBUTES):
        return None
    if list(inspect.signature(type(module).forward).parameters) != _ARGUMENTS:
        return "its forward takes other arguments than a decoder's attention layer"
    reason = _structural_reason(module)
    if reason is not None:
        return reason
    spec = _computed(module)
    if isinstance(spec, str) or not children & _NORMS:
        return spec
    q_norm, k_norm = recognise_norm(module.q_norm), recognise_norm(module.k_norm)
    norms = (q_norm, k_norm) if isinstance(q_norm, NormSpec) and isinstance(k_norm, NormSpec) else None
    return replace(spec, norms=norms)


def _structural_reason(module: Any) -> str | None:
    if set(module._parameters) - {"sinks"} or module._buffers:
        return f"it has tensors of its own: {', '.join([*module._parameters, *module._buffers])}"
    if module.num_key_value_groups < 1:
        return "it has more key heads than query heads"
    width = module.head_dim
    if width % HEAD_DIM_MULTIPLE or not 0 < width <= MAX_HEAD_DIM:
        return f"its heads are {width} wide, not a multiple of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM}"
    for name in _NORMS & set(module._modules):
        weight = getattr(module._modules[name], "weight", None)
        if not isinstance(weight, Tensor) or tuple(weight.shape) != (width,):
            return f"its {name} is not a norm of heads"
    return None


def _computed(module: Any) -> AttentionSpec | str:
    """What the experiment says about modules like this one; it is made once."""
    key = _key(module)
    try:
        spec = _known.get(key)
    except TypeError:  # an attribute that cannot be hashed: nothing to remember it by
        return _by_experiment(module)
    if spec is None:
        spec = _known[key] = _by_experiment(module)
    return spec


def _key(module: Any) -> tuple:
    """Everything that may change what ``forward`` computes, except for sizes and weights."""
    ignored = ("config", "layer_idx", "training", "forward", "head_dim", "scaling", "attention_dropout")
    own = sorted((name, value) for name, value in vars(module).items() if not name.startswith("_"))
    attributes = tuple(item for item in own if item[0] not in ignored)
    sinks = module._parameters.get("sinks") is None
    return type(module), type(module).forward, attributes, sinks, _gates(module), *module._modules


def _gates(module: Any) -> bool:
    """Whether q_proj gives queries and gates, told by o_proj, which takes as many channels as queries have."""
    wide, narrow = _features(module.q_proj, "out_features"), _features(module.o_proj, "in_features")
    return wide is not None and wide == 2 * (narrow or 0)


def _features(projection: Any, name: str) -> int | None:
    size = getattr(projection, name, None)
    return size if isinstance(size, int) else None


class _Recorder:
    """Stands in for transformers' registry of attention functions: the model's eager one, with its arguments kept."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple, dict[str, Any]]] = []

    def get_interface(self, name: str, default: Any) -> Any:
        def attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls.append((args, kwargs))
            return default(module, *args, **kwargs)

        return attend


def _by_experiment(module: Any) -> AttentionSpec | str:
    from inlay.hf import attention_layer  # which needs AttentionSpec

    recorder = _Recorder()
    forward = with_eager_functions(type(module).forward, {"ALL_ATTENTION_FUNCTIONS": recorder})
    if not callable(forward):
        return forward
    twin = _twin(module)
    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.random.fork_rng(devices=[]):
        try:
            keywords = _keywords(twin, forward, recorder)
            if isinstance(keywords, str):
                return keywords
            wide, narrow = (_rotation(twin, forward, recorder, width) for width in (_WIDTH, _WIDTH // 2))
            spec = AttentionSpec(_gates(module), keywords, wide, narrow)
            width = _WIDTH if spec.wide is not None else _WIDTH // 2
            if spec.wide is None and spec.narrow is None:
                return "it does not rotate queries and keys as Inlay's op does"
            for theirs, ours in zip(_calls(twin, width), _calls(twin, width), strict=True):
                expected = forward(twin, **theirs)[0]
                actual = attention_layer.run(twin, spec, **ours, kwargs={}).output
                if not _agree(actual, expected):
                    return "it computes something else than Inlay's attention layer"
        except Exception as error:  # whatever an unknown class raises, it is not a layer we know
            return f"its forward could not be tried out: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return spec


def _keywords(twin: Any, forward: Any, recorder: _Recorder) -> frozenset[str] | str:
    """What the layer hands to its attention function besides scaling and dropout; or why that is not known."""
    for training in (False, True):
        twin.train(training)
        own = object()
        mask = torch.zeros(2, 1, 5, 5, dtype=torch.float32, device="cpu")
        arguments = _arguments(twin, 5, _angles(twin, forward), mask)
        forward(twin, **arguments, own=own)
        if not recorder.calls:
            return "its forward does not itself call an attention function of transformers"
        (_, _, _, given_mask, *rest), keywords = recorder.calls[-1]
        keywords = dict(keywords)
        dropout = keywords.pop("dropout", None)
        scaling = keywords.pop("scaling", None)
        if rest or given_mask is not mask or keywords.pop("own", None) is not own:
            return "it does not hand its mask and keywords on to its attention function"
        if dropout != (twin.attention_dropout if training else 0.0) or scaling != twin.scaling:
            return "its dropout or scaling is not what its attributes say"
        for name in _IN_THE_MASK & keywords.keys():
            del keywords[name]
        unknown = keywords.keys() - KEYWORDS.keys()
        if unknown:
            return f"it hands {', '.join(sorted(unknown))} to its attention function"
        for name, value in keywords.items():
            if value is not getattr(twin, KEYWORDS[name], None):
                return f"the {name} of its attention is not its {KEYWORDS[name]}"
    twin.eval()
    return frozenset(keywords)


def _angles(twin: Any, forward: Any) -> int:
    """A width of angles that the layer takes."""
    try:
        forward(twin, **_arguments(twin, 5, _WIDTH, None))
    except RuntimeError:  # shapes that do not fit
        return _WIDTH // 2
    return _WIDTH


def _rotation(twin: Any, forward: Any, recorder: _Recorder, width: int) -> Rotation | None:
    """How the layer rotates by angles of a width; None if it does not take them, or as no op does."""
    found: dict[tuple[bool, bool], dict[torch.dtype, str]] = {}
    for dtype in _DTYPES:
        half = _converted(twin, dtype)
        arguments = _arguments(half, 40, width, None, dtype)
        try:
            forward(half, **arguments)
        except RuntimeError:  # shapes that do not fit; or dtypes
            continue
        (q, k, *_), _ = recorder.calls[-1]
        before = _queries_and_keys(half, arguments["hidden_states"])
        for pairs, interleaved, rounding in product((False, True), (False, True), ("stepwise", "once")):
            if dtype in found.get((pairs, interleaved), {}) or (pairs and width == _WIDTH):
                continue
            rotary_dim = 2 * width if pairs else width
            cos, sin = arguments["position_embeddings"]
            ours = qk_norm_rope(
                *before, cos, sin, rotary_rounding=rounding, rotary_dim=rotary_dim, interleaved=interleaved
            )
            if all(_agree(*pair) for pair in zip(ours, (q.transpose(1, 2), k.transpose(1, 2)), strict=True)):
                found.setdefault((pairs, interleaved), {})[dtype] = rounding
    for (pairs, interleaved), roundings in found.items():
        if torch.float32 in roundings:
            return Rotation(pairs, interleaved, roundings)
    return None


def _queries_and_keys(twin: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Normed, not rotated, [B, S, H, D]."""
    shape = (*hidden_states.shape[:-1], -1, _WIDTH)
    q = twin.q_proj(hidden_states).view(*shape[:-1], twin.inlay_gated * _WIDTH)[..., :_WIDTH]
    k = twin.k_proj(hidden_states).view(shape)
    return (twin.q_norm(q), twin.k_norm(k)) if "q_norm" in twin._modules else (q, k)


class _Norm(nn.Module):
    """Stands in for a norm, which is called as a module and recognised by itself."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + x.mean(-1, keepdim=True)


def _twin(module: Any) -> Any:
    """A small stand-in for a layer: its plain attributes, no tensors, hooks or patches of it, few small heads."""
    cls: Any = type(module)
    twin = uninitialised(cls)
    nn.Module.__init__(twin)
    ignored = {"forward", "training", *vars(twin)}
    vars(twin).update({name: value for name, value in vars(module).items() if name not in ignored})
    heads = _HEADS * module.num_key_value_groups
    vars(twin).update(layer_idx=0, head_dim=_WIDTH, scaling=0.3, attention_dropout=0.25)
    vars(twin)["inlay_gated"] = 2 if _gates(module) else 1
    if getattr(module, "attn_logit_softcapping", None) is not None:
        vars(twin)["attn_logit_softcapping"] = 3.0  # low enough to show
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> nn.Parameter:
        values = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        return nn.Parameter(values, requires_grad=False)

    def linear(rows: int, columns: int) -> nn.Linear:
        layer = nn.Linear(columns, rows, bias=False, device="meta")  # which draws no random numbers
        layer.weight = nn.Parameter(random(rows, columns) * columns**-0.5, requires_grad=False)
        return layer

    twin.q_proj = linear(heads * _WIDTH * twin.inlay_gated, _HIDDEN)
    twin.k_proj, twin.v_proj = linear(_HEADS * _WIDTH, _HIDDEN), linear(_HEADS * _WIDTH, _HIDDEN)
    twin.o_proj = linear(_HIDDEN, heads * _WIDTH)
    for name in _NORMS & set(module._modules):
        setattr(twin, name, _Norm(random(_WIDTH)))
    if "sinks" in module._parameters:
        twin.sinks = random(heads)
    return twin.eval()


def _converted(twin: Any, dtype: torch.dtype) -> Any:
    """The stand-in in another dtype, in modules and parameters of its own."""
    cls: Any = type(twin)
    other = uninitialised(cls)
    nn.Module.__init__(other)
    vars(other).update({name: value for name, value in vars(twin).items() if name not in vars(other)})
    for name, parameter in twin._parameters.items():
        setattr(other, name, nn.Parameter(parameter.to(dtype), requires_grad=False))
    for name, child in twin._modules.items():
        copy = _Norm(child.weight.to(dtype)) if isinstance(child, _Norm) else nn.Linear(1, 1, bias=False, device="meta")
        copy.weight = nn.Parameter(child.weight.to(dtype), requires_grad=False)
        setattr(other, name, copy)
    return other.eval()


def _arguments(
    twin: Any, tokens: int, width: int, mask: Tensor | None, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """The arguments of a forward without a cache."""
    generator = torch.Generator().manual_seed(tokens)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    angles = random(2, tokens, width // 2)
    angles = torch.cat([angles, angles], -1)
    return {
        "hidden_states": random(2, tokens, _HIDDEN).to(dtype),
        "position_embeddings": (angles.cos().to(dtype), angles.sin().to(dtype)),
        "attention_mask": mask,
        "past_key_values": None,
    }


def _calls(twin: Any, width: int) -> Iterator[dict[str, Any]]:
    """Arguments of calls: a padded batch, then tokens that fill a cache and go on with it."""
    from transformers.cache_utils import DynamicCache

    hidden = torch.finfo(torch.float32).min
    mask = torch.full((2, 1, 20, 20), hidden, dtype=torch.float32, device="cpu").triu(1)
    mask[1, :, 3:, :3] = hidden
    yield _arguments(twin, 20, width, mask)
    cache = DynamicCache()
    for before, tokens in ((0, 6), (6, 1), (7, 4)):
        mask = torch.full((tokens, before + tokens), hidden, dtype=torch.float32, device="cpu")
        mask = mask.triu(before + 1)[None, None]
        yield {**_arguments(twin, tokens, width, mask if tokens > 1 else None), "past_key_values": cache}


def _agree(actual: Tensor, expected: Tensor) -> bool:
    if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        return False
    if actual.dtype in (torch.bfloat16, torch.float16):
        return (actual == expected).double().mean().item() >= 0.99
    return bool((actual - expected).abs().max() <= 1e-4 * expected.abs().max())
