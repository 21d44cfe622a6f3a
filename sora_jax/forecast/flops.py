"""Counts the floating point operations of a traced program, without compiling it.

Recomputation is counted.
"""

import math


def flops_of(jaxpr, devices: int = 1) -> float:
    """FLOPs of products and convolutions in a traced program, times the trips of loops.

    Of the branches of a platform switch, one with a kernel is counted. An attention kernel
    counts 4 n m e per head forward, and twice that for the gradient (arXiv 2205.14135).
    The FLOPs inside a shard_map count once for each device.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, [*_inner(equation)]
        if name == "dot_general":
            total += _product(equation)
        elif name == "conv_general_dilated":
            total += _convolution(equation)
        elif name == "pallas_call":
            total += _kernel(equation)
        elif name == "scan":
            total += equation.params["length"] * flops_of(inner[0], devices)
        elif name == "shard_map":
            total += devices * sum(map(flops_of, inner))
        elif name == "cond":
            kernels = [branch for branch in inner if _has_kernel(branch)]
            total += max(flops_of(branch, devices) for branch in kernels or inner)
        else:
            total += sum(flops_of(one, devices) for one in inner)
    return total


def _inner(equation):
    """The programs inside an operation."""
    for value in equation.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            one = getattr(one, "jaxpr", one)
            if hasattr(one, "eqns"):
                yield one


def _has_kernel(jaxpr) -> bool:
    return any(
        equation.primitive.name == "pallas_call"
        or any(map(_has_kernel, _inner(equation)))
        for equation in jaxpr.eqns
    )


def _product(equation) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, result = equation.invars[0].aval, equation.outvars[0].aval
    depth = math.prod(left.shape[axis] for axis in contracted)
    return 2.0 * math.prod(result.shape) * depth


def _convolution(equation) -> float:
    weights, result = equation.invars[1].aval, equation.outvars[0].aval
    outputs = weights.shape[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * math.prod(result.shape) * math.prod(weights.shape) / outputs


def _kernel(equation) -> float:
    name = str(equation.params.get("name") or equation.params["name_and_src_info"])
    q, k = [v.aval for v in equation.invars if v.aval.dtype.kind not in "iub"][:2]
    value = 4.0 * math.prod(q.shape) * k.shape[-2]
    for part, times in (("_fwd", 1), ("_dkv", 2)):
        if part in name:
            return times * value
    raise ValueError(f"what the kernel {name} computes is not known")
