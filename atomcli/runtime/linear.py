"""Linear layers whose weights are stored in a scheme and whose inputs are quantized as they arrive."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from atomcli.errors import UsageError
from atomcli.formats.layout import InputLayout
from atomcli.formats.scheme import Scheme
from atomcli.formats.weights import QuantizedWeight, tensor_layout
from atomcli.kernels import dispatch, reference

T = TypeVar("T")
Kernel = Callable[["QuantLinear", Tensor, bool], Tensor]
"""A product on some device: (linear, x (..., in_features), add_bias) -> y (..., out_features) in x's dtype."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def permutation_dtype(in_features: int) -> torch.dtype:
    """Dtype in which a permutation of `in_features` channels is stored."""
    return torch.int16 if in_features < 2**15 else torch.int32


class SharedInput:
    """Quantizes the input of a site once for all the linears that read it.

    The last input is held until each of the `readers` has had it, so that a site costs no memory between forwards.
    """

    def __init__(self, readers: int = 1) -> None:
        self.readers = readers
        self._source: Tensor | None = None
        self._kind: str | None = None
        self._quantized: Any = None
        self._reads = 0

    def once(self, x: Tensor, kind: str, quantize: Callable[[], T]) -> T:
        """quantize() of x in the form `kind`, or what it returned to the reader before for the same x."""
        if self.readers == 1:
            return quantize()
        if self._source is not x or self._kind != kind:
            self._source, self._kind, self._reads = x, kind, 0
            self._quantized = quantize()
        quantized: T = self._quantized
        self._reads += 1
        if self._reads >= self.readers:
            self._source = self._quantized = None
        return quantized


class QuantLinear(nn.Module):
    """y = x W^T + bias with W in its scheme and x quantized per token; the tensors are those of the checkpoint.

    On a GPU they give way to the weight that was repacked for the kernel, and lie in the host's memory from then on.
    `observer` gets the input the product sees, (tokens, in_features) fp32 in the layout's order and basis.
    `keep_dequantized` trades memory (fp32 weight) for the time to unpack the weight at each call.
    """

    permutation: Tensor | None
    signs: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        *,
        bias: bool = False,
        permutation: bool = True,
        signs: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        """An empty layer to load a checkpoint into; `dtype` is the model's, for bias and unquantized weights."""
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self.observer: Callable[[Tensor], None] | None = None
        self.shared_input = SharedInput()
        self.keep_dequantized = False
        self._dequantized: Tensor | None = None
        self._product: dispatch.Product | None = None
        self._home: torch.device | None = None  # where the layer works, while its weight lies on the host
        for spec in tensor_layout(scheme, out_features, in_features, float_dtype=dtype):
            self.register_buffer(spec.suffix, torch.empty(spec.shape, dtype=spec.dtype, device=device))
        optional: dict[str, tuple[bool, int, torch.dtype]] = {
            "permutation": (permutation, in_features, permutation_dtype(in_features)),
            "signs": (signs, in_features, torch.int8),
            "bias": (bias, out_features, dtype),
        }
        for name, (present, size, kind) in optional.items():
            self.register_buffer(name, torch.empty(size, dtype=kind, device=device) if present else None)

    @classmethod
    def from_weight(cls, weight: QuantizedWeight, layout: InputLayout, bias: Tensor | None = None) -> "QuantLinear":
        """A layer around a weight, its layout and a bias (out_features,) in the model's dtype."""
        rows, columns = weight.shape
        expected = input_layout(weight.scheme, columns, layout.permutation, layout.signs)
        if (layout.outliers, layout.hadamard) != (expected.outliers, expected.hadamard) or (
            layout.hadamard and layout.group != expected.group
        ):
            raise UsageError(
                f"The layout ({layout.outliers} outliers, Hadamard {layout.hadamard}, blocks of {layout.group}) is not "
                f"that of scheme {weight.scheme.name}."
            )
        linear = cls(
            columns,
            rows,
            weight.scheme,
            bias=bias is not None,
            permutation=layout.permutation is not None,
            signs=layout.signs is not None,
            dtype=weight.codes.dtype if weight.scheme.weights.element == "float" else torch.bfloat16,
            device="meta",
        )
        # A parameter of the model that was not rounded would become a parameter of this layer.
        tensors = {name: tensor.detach() for name, tensor in weight.tensors().items()}
        if layout.permutation is not None:
            tensors["permutation"] = layout.permutation.to(permutation_dtype(columns))
        if layout.signs is not None:
            tensors["signs"] = layout.signs
        if bias is not None:
            tensors["bias"] = bias.detach()
        linear.load_state_dict(tensors, strict=True, assign=True)
        return linear

    @classmethod
    def from_entry(
        cls,
        entry: Mapping[str, Any],
        schemes: Mapping[str, Scheme],
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> "QuantLinear":
        """The empty layer that an entry of quantization_config["linears"] describes (see `entry`)."""
        return cls(
            entry["in_features"],
            entry["out_features"],
            scheme_of(entry, schemes),
            bias=entry.get("bias", False),
            permutation=entry.get("permutation", False),
            signs=entry.get("signs", False),
            dtype=dtype,
            device=device,
        )

    def entry(self, scheme_name: str | None = None, activation_clip: float | None = None) -> dict[str, Any]:
        """This layer's entry of quantization_config["linears"]; it says which optional tensors there are."""
        entry: dict[str, Any] = {
            "scheme": scheme_name or self.scheme.name,
            "in_features": self.in_features,
            "out_features": self.out_features,
        }
        if activation_clip is not None:
            entry["activation_clip"] = activation_clip
        return entry | {name: True for name in ("bias", "permutation", "signs") if getattr(self, name) is not None}

    @property
    def weight_tensors(self) -> QuantizedWeight:
        """The weight as `formats` sees it, where the layer works: its own tensors unless they lie on the host."""
        specs = tensor_layout(self.scheme, self.out_features, self.in_features)
        fields = {spec.field: getattr(self, spec.suffix).to(self.device) for spec in specs}
        return QuantizedWeight(self.scheme, (self.out_features, self.in_features), **fields)

    @property
    def layout(self) -> InputLayout:
        """The order and basis of the input channels."""
        return input_layout(self.scheme, self.in_features, self.permutation, self.signs)

    @property
    def device(self) -> torch.device:
        """Where the layer works."""
        return self._home or next(self.buffers()).device

    def dequantized(self) -> Tensor:
        """The weight the product sees, (out_features, in_features) fp32, in the layout's order and basis."""
        if self._dequantized is not None and self._dequantized.device == self.device:
            return self._dequantized
        weight = self.weight_tensors.dequantize()
        self._dequantized = weight if self.keep_dequantized else None
        return weight

    def kernel_choice(self) -> dispatch.Choice:
        """What runs this layer where it lies, or why the reference does."""
        return dispatch.choose(self.scheme, self.device, self.in_features)

    def product(self) -> dispatch.Product:
        """The weight repacked for its kernel, made at the first call on a device."""
        if self._product is None:
            self._product = dispatch.prepare(self.weight_tensors, self.layout)
            self.keep_on_host()
        return self._product

    def keep_on_host(self) -> None:
        """Leave the device to a repacked weight: the checkpoint's own is for saving, and for the reference."""
        self._home = self.device
        for spec in tensor_layout(self.scheme, self.out_features, self.in_features):
            setattr(self, spec.suffix, getattr(self, spec.suffix).cpu())

    def forward(self, x: Tensor, add_bias: bool = True) -> Tensor:
        """x (..., in_features) -> (..., out_features) in x's dtype; without the bias when `add_bias` is False."""
        return pick_kernel(self, x)(self, x, add_bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantLinear":
        # A cast of the model (model.half()) must not touch the scales, whose dtype is part of the format: `fn` sees
        # them as integers, which it moves and never casts.
        scales = {
            name: tensor.dtype
            for name, tensor in self._buffers.items()
            if tensor is not None and tensor.is_floating_point() and name not in ("weight", "bias")
        }
        for name, dtype in scales.items():
            self._buffers[name] = getattr(self, name).view(_INTEGERS[dtype.itemsize])
        super()._apply(fn, recurse)
        for name, dtype in scales.items():
            self._buffers[name] = getattr(self, name).view(dtype)
        self._dequantized = self._product = self._home = None
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._dequantized = self._product = None
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme.name}"


def scheme_of(entry: Mapping[str, Any], schemes: Mapping[str, Scheme]) -> Scheme:
    """The scheme of an entry of quantization_config["linears"], with the entry's own clip where it has one."""
    scheme = schemes[entry["scheme"]]
    if "activation_clip" in entry:
        scheme = replace(scheme, activations=replace(scheme.activations, clip=entry["activation_clip"]))
    return scheme


def input_layout(
    scheme: Scheme, in_features: int, permutation: Tensor | None = None, signs: Tensor | None = None
) -> InputLayout:
    """The layout that a scheme prescribes for an input of `in_features` channels."""
    return InputLayout(
        in_features,
        scheme.outliers,
        scheme.hadamard_block,
        None if permutation is None else permutation.long(),
        signs,
        scheme.transform == "hadamard",
    )


def reference_kernel(linear: QuantLinear, x: Tensor, add_bias: bool) -> Tensor:
    """The product of `kernels.reference`: fp32 over dequantized operands, on any device."""
    rows = x.reshape(-1, x.shape[-1])
    tokens = linear.shared_input.once(
        x, "reference", lambda: reference.quantized_input(rows, linear.scheme, linear.layout)
    )
    if linear.observer is not None:
        linear.observer(tokens)
    y = tokens @ linear.dequantized().T
    if add_bias and linear.bias is not None:
        y = y + linear.bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], -1)


def gpu_kernel(linear: QuantLinear, x: Tensor, add_bias: bool) -> Tensor:
    """The product on the kernel that `kernels.dispatch` chose for the layer's scheme and card."""
    product = linear.product()
    rows = x.reshape(-1, x.shape[-1])
    operand = linear.shared_input.once(x, product.container, lambda: product.quantize(rows))
    bias = linear.bias.float() if add_bias and linear.bias is not None else None
    return product.multiply(operand, rows.shape[0], x.dtype, bias).reshape(*x.shape[:-1], -1)


def pick_kernel(linear: QuantLinear, x: Tensor) -> Kernel:
    """The implementation for a layer and an input: the one seam where GPU kernels come in.

    An observer needs the dequantized input, and fp32 models their fp32 output: both are the reference's.
    """
    on_gpu = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and linear.observer is None
    return gpu_kernel if on_gpu and linear.kernel_choice().kernel is not None else reference_kernel


def share_inputs(linears: list[nn.Module]) -> None:
    """Let the quantized linears of one site quantize their input once, where they would all do the same with it."""
    quantized = [linear for linear in linears if isinstance(linear, QuantLinear)]
    while quantized:
        first, rest = quantized[0], quantized[1:]
        same = [first] + [other for other in rest if reads_alike(first, other)]
        shared = SharedInput(len(same))
        for linear in same:
            linear.shared_input = shared
        quantized = [linear for linear in rest if linear not in same]


def keep_dequantized_weights(model: nn.Module, limit_bytes: int) -> bool:
    """Let the reference path keep its fp32 weights if all of them fit in `limit_bytes`; whether they do."""
    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    fits = sum(4 * linear.in_features * linear.out_features for linear in linears) <= limit_bytes
    for linear in linears:
        linear.keep_dequantized = fits
    return fits


def reads_alike(first: QuantLinear, second: QuantLinear) -> bool:
    """Whether two linears make the same operand of the same input."""
    a, b = first.scheme, second.scheme
    if (a.activations, a.outliers, a.transform, a.hadamard_block) != (
        b.activations,
        b.outliers,
        b.transform,
        b.hadamard_block,
    ):
        return False
    pairs = ((first.permutation, second.permutation), (first.signs, second.signs))
    return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)
